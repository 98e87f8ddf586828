"""Faults in settings: each is told in one sentence, without a traceback or a secret."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from server.settings import Settings, load_settings

Fault = Callable[..., str]


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("BURNISH_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def fault(monkeypatch: pytest.MonkeyPatch) -> Fault:
    """What is said of these variables."""

    def told(**variables: str) -> str:
        for name, value in variables.items():
            monkeypatch.setenv(f"BURNISH_{name}", value)
        with pytest.raises(SystemExit) as end:
            load_settings()
        return str(end.value)

    return told


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("PORT", "abc", "'port' (BURNISH_PORT): input should be a valid integer"),
        ("PORT", "", "'port' (BURNISH_PORT)"),
        ("HOST", "0.0.0.0:8000", "the port is a setting of its own (found '0.0.0.0:8000')"),
        ("HOST", "http://here", "expected an address such as 127.0.0.1"),
        ("LOG_LEVEL", "loud", "'critical', 'error', 'warning', 'info' or 'debug' (found 'loud')"),
        ("ENGINE", "{", "BURNISH_ENGINE is no JSON object"),
        ("DATABASE", "postgres://u:p@h/d", "as in BURNISH_DATABASE__URL=…"),
        ("ENGINE__ARGS", "max-num-seqs=4", "BURNISH_ENGINE__ARGS is no JSON object"),
        ("ENGINE__URLS", "gpu:8001", "as in http://gpu-host:8000 (found 'gpu:8001')"),
        ("ENGINE__URLS", "http://gpu:port", "expected the address of a vLLM server"),
        ("ENGINE__URLS", "http://u:secret@gpu", "give the key as api_key"),
        ("ENGINE__URLS", "http://a:1,http://a:1/v1", "names a server twice"),
        ("ENGINE__MAX_LORA_RANK", "24", "1, 8, 16, 32, 64, 128, 256, 320 or 512 (found 24)"),
        ("ENGINE__ARGS", '{"max_loras": 1}', "'max-loras': set engine.max_loras instead"),
        ("ENGINE__ARGS", '{"no-enable-lora": true}', "'enable-lora': Burnish sets it itself"),
        ("DATABASE__URL", "mysql://u:secret@h/d", "expected postgresql://user:password@host"),
        ("DATABASE__URL", "mysql://u:se/secret@h/d", "(found 'mysql://…@h/d')"),
        ("DATABASE__URL", "postgresql://u:se@secret@h/d", "(found 'postgresql://…@h/d')"),
        ("DATABASE__URL", "postgresql://u:secret@h:abc/d", "in the password written as %2F"),
        ("DATABASE__URL", "sqlite://burnish.db", "three slashes"),
        ("DATABASE__DIRECT_URL", "postgresql://u:secret@h/d", "and beside database.url"),
        ("WORKER__GATEWAY_URL", "localhost:8000", "expected the address of a gateway"),
        ("BOOTSTRAP_KEY", "sk-secret one\ntwo", "holds a blank, a line break"),
        ("ENGINE__API_KEY", "  ", "is empty: leave it out"),
        ("ENGINE__API_KEY", "secret-ü", "a letter beyond ASCII"),
        ("MODEL__PATH", "/models/my@model", "clients could not ask for it; set model.name"),
        ("MODEL__PATH", "/models/assistant", "both be called 'assistant': set model.name"),
        ("DEPLOYMENT", "My Assistant", "'deployment' (BURNISH_DEPLOYMENT)"),
        ("DATA", "~nobody-of-this-name/x", "this user has none"),
        ("NO_SUCH", "1", "unknown setting BURNISH_NO_SUCH"),
        ("ENGINE__NO_SUCH", "1", "unknown setting BURNISH_ENGINE__NO_SUCH"),
    ],
)
def test_a_fault_in_a_variable_is_one_sentence(
    fault: Fault, variable: str, value: str, said: str
) -> None:
    told = fault(**{variable: value})
    assert said in told
    assert told.startswith("burnish: ")
    assert len(told.splitlines()) == 1
    assert "secret" not in told


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"port = \n", "is no TOML: Invalid value (at line 1, column 8)"),
        (b'data = "\xff"\n', "is not UTF-8 (byte 9)"),
        (b"engine = 3\n", "setting 'engine' (burnish.toml)"),
        (b"[gateway]\nfoo = 1\n", "unknown setting 'gateway.foo' (burnish.toml)"),
        (b'[engine]\nmax_loras = "x"\n', "setting 'engine.max_loras' (burnish.toml)"),
    ],
)
def test_a_fault_in_the_file_names_it(fault: Fault, content: bytes, said: str) -> None:
    Path("burnish.toml").write_bytes(content)
    assert said in fault()


def test_a_file_that_is_named_and_not_there_is_a_fault(fault: Fault, tmp_path: Path) -> None:
    assert "there is no such file" in fault(CONFIG="nowhere.toml")
    assert "Is a directory" in fault(CONFIG=str(tmp_path))


def test_every_fault_is_told_at_once(fault: Fault) -> None:
    told = fault(PORT="x", ENGINE__MAX_LORAS="y")
    assert "BURNISH_PORT" in told
    assert "BURNISH_ENGINE__MAX_LORAS" in told


def test_values_are_taken_as_people_write_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/u")
    for name, value in {
        "DATA": "~/burnish",
        "HOST": "[::1]",
        "LOG_LEVEL": "INFO",
        "BOOTSTRAP_KEY": "sk-burnish-abc\n",
        "DATABASE__URL": "postgres://u:p@h/d",
        "ENGINE__URLS": "http://a:1/v1, https://b/vllm/",
        "ENGINE__MAX_LORA_RANK": "32",
        "ENGINE__ARGS__MAX_NUM_SEQS": "4",
        "WORKER__GATEWAY_URL": "http://here:8000/",
    }.items():
        monkeypatch.setenv(f"BURNISH_{name}", value)
    settings = load_settings()
    assert settings.data == Path("/home/u/burnish")
    assert settings.host == "::1"
    assert settings.log_level == "info"
    assert settings.bootstrap_key is not None
    assert settings.bootstrap_key.get_secret_value() == "sk-burnish-abc"
    assert settings.database_url == "postgresql://u:p@h/d"
    assert settings.engine.urls == ["http://a:1", "https://b/vllm"]
    assert settings.engine.max_lora_rank == 32
    assert settings.engine.args == {"max_num_seqs": "4"}
    assert settings.worker.gateway_url == "http://here:8000"


def test_a_file_may_begin_with_a_byte_order_mark() -> None:
    Path("burnish.toml").write_bytes(b"\xef\xbb\xbfport = 8123\n")
    assert load_settings().port == 8123


def test_flags_pass_the_environment_and_that_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("burnish.toml").write_text('port = 1\nhost = "::1"\nlog_level = "error"\n')
    monkeypatch.setenv("BURNISH_PORT", "2")
    monkeypatch.setenv("BURNISH_HOST", "::2")
    settings = load_settings(port=3)
    assert (settings.port, settings.host, settings.log_level) == (3, "::2", "error")


def test_settings_read_nothing_of_what_is_not_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BURNISH_API_KEY", "for the command line")
    assert load_settings() == Settings()
