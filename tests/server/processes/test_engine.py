"""Which command starts the engine, and what a gateway is told about it."""

from __future__ import annotations

import json
import os
import signal
import stat
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from server.machine import GIB, Machine
from server.processes.children import Launch, start_guarded
from server.processes.engine import (
    EngineProcess,
    EngineSettingsError,
    answers_ok,
    engine_command,
    free_port,
)
from server.processes.engine_record import read_engine_record
from server.settings import EngineSettings, ModelSettings, Settings
from tuner.base_models import BaseModel
from tuner.chat_template import ChatTemplate
from tuner.control_tokens import ControlTokens

LAPTOP = Machine("x86_64", (0, 1), frozenset({"avx2"}), 16 * GIB, "cpu")
BASE = BaseModel(
    name="tiny",
    path=Path("/models/tiny"),
    revision="sha256-1",
    template_hash="0",
    architecture="llama",
    max_position_embeddings=8192,
    vocab_size=300,
    eos_token_ids=(2,),
    linear_modules={},
    chat_template=ChatTemplate("{{ messages[0]['content'] }}"),
    control_tokens=ControlTokens(),
)


def command(
    machine: Machine = LAPTOP, base: BaseModel = BASE, **engine: Any
) -> tuple[dict[str, str | bool], dict[str, str]]:
    """The engine's options by name (True for a flag), and its environment."""
    settings = Settings(model=ModelSettings(path="/models/tiny"), engine=EngineSettings(**engine))
    argv, environment = engine_command(settings, machine, base, port=4711, api_key="sk-secret")
    assert argv[1:4] == ["-P", "-m", "vllm.entrypoints.openai.api_server"]
    words = " ".join(argv[4:]).split("--")[1:]
    return {
        (parts := word.split(None, 1))[0]: (parts[1].strip() if parts[1:] else True)
        for word in words
    }, environment


def test_the_parser_of_tool_calls_follows_from_the_base_s_template_unless_one_is_named() -> None:
    template = "{% if tools %}{{ tools }}{% endif %}<tool_call>"
    settings = Settings(model=ModelSettings(path="/models/tiny"))
    argv, _ = engine_command(settings, LAPTOP, BASE, port=1, api_key="k", template=template)
    assert "--enable-auto-tool-choice" in argv
    assert argv[argv.index("--tool-call-parser") + 1] == "hermes"
    options, _ = command()
    assert not {"enable-auto-tool-choice", "tool-call-parser"} & options.keys()
    options, _ = command(tool_parser="xlam")
    assert (options["enable-auto-tool-choice"], options["tool-call-parser"]) == (True, "xlam")
    options, _ = command(args={"tool_call_parser": "olmo3", "enable-auto-tool-choice": True})
    assert (options["enable-auto-tool-choice"], options["tool-call-parser"]) == (True, "olmo3")
    with pytest.raises(EngineSettingsError, match=r"engine\.tool_parser"):
        command(tool_parser="xlam", args={"tool_call_parser": "olmo3"})


def test_the_engine_listens_on_loopback_with_its_key_in_the_environment() -> None:
    options, environment = command()
    assert (options["host"], options["port"]) == ("127.0.0.1", "4711")
    assert environment["VLLM_API_KEY"] == "sk-secret"
    assert "sk-secret" not in options.values()


def test_adapters_can_be_loaded_into_as_many_slots_as_are_set() -> None:
    options, environment = command(max_loras=7, max_lora_rank=32)
    assert options["enable-lora"] is True
    assert [options[key] for key in ("max-loras", "max-cpu-loras", "max-lora-rank")] == [
        "7",
        "7",
        "32",
    ]
    assert environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    assert command(max_loras=7, max_cpu_loras=9)[0]["max-cpu-loras"] == "9"


@pytest.mark.parametrize(("device", "expected"), [("cpu", "float32"), ("cuda", "auto")])
def test_a_processor_computes_in_float32_unless_told_otherwise(device: Any, expected: str) -> None:
    machine = replace(LAPTOP, device=device)
    assert command(machine)[0]["dtype"] == expected
    assert command(machine, dtype="bfloat16")[0]["dtype"] == "bfloat16"


def test_a_small_machine_computes_on_all_its_cores() -> None:
    assert command()[1]["VLLM_CPU_OMP_THREADS_BIND"] == "0,1"
    assert command(threads=1)[1]["VLLM_CPU_OMP_THREADS_BIND"] == "0"
    assert command(replace(LAPTOP, cpus=(2, 5)), threads=9)[1]["VLLM_CPU_OMP_THREADS_BIND"] == "2,5"


@pytest.mark.parametrize(("memory_gib", "kv_cache_gib"), [(8, 1), (24, 2), (64, 5), (512, 8)])
def test_the_kv_cache_grows_with_memory(memory_gib: int, kv_cache_gib: int) -> None:
    machine = replace(LAPTOP, memory_bytes=memory_gib * GIB)
    assert command(machine)[1]["VLLM_CPU_KVCACHE_SPACE"] == str(kv_cache_gib)
    assert command(machine, kv_cache_gib=3)[1]["VLLM_CPU_KVCACHE_SPACE"] == "3"


def test_the_context_never_exceeds_what_the_model_was_made_for() -> None:
    assert command()[0]["max-model-len"] == "4096"
    assert command(base=replace(BASE, max_position_embeddings=512))[0]["max-model-len"] == "512"
    assert command(max_model_len=1024)[0]["max-model-len"] == "1024"


def test_adapters_reach_the_layers_and_never_the_output_head() -> None:
    """`prompt_logprobs` beside a running request kills a CPU engine whose head is wrapped."""
    modules = {
        f"model.layers.{layer}.{module}": (8, 8)
        for layer in (0, 1)
        for module in ("self_attn.q_proj", "mlp.down_proj")
    }
    layered = replace(BASE, linear_modules=modules)
    assert command(base=layered)[0]["lora-target-modules"] == "down_proj q_proj"
    ours = command(base=layered, args={"lora-target-modules": ["v_proj"]})[0]
    assert ours["lora-target-modules"] == "v_proj"
    assert "lora-target-modules" not in command()[0]  # quantised: nothing is known of its layers


def test_a_gpu_is_left_to_vllms_own_defaults() -> None:
    options, environment = command(replace(LAPTOP, device="cuda"))
    assert not {"max-model-len", "max-num-seqs"} & options.keys()
    assert not [name for name in environment if name.startswith("VLLM_CPU")]


def test_further_arguments_are_handed_on_verbatim_and_win() -> None:
    options, _ = command(
        args={
            "max-num-seqs": 4,
            "enforce_eager": True,
            "enable-prefix-caching": False,
            "lora-target-modules": ["q_proj", "v_proj"],
            "override-generation-config": {"top_k": 5},
        }
    )
    assert options["max-num-seqs"] == "4"
    assert options["enforce-eager"] is True
    assert options["no-enable-prefix-caching"] is True
    assert options["lora-target-modules"] == "q_proj v_proj"
    assert options["override-generation-config"] == '{"top_k": 5}'


@pytest.mark.parametrize("key", ["api_key", "host", "--port", "served-model-name", "max_loras"])
def test_arguments_that_would_cut_the_gateway_off_are_refused(key: str) -> None:
    with pytest.raises(ValidationError, match=key.strip("-").replace("_", "-")):
        command(args={key: "x"})


@pytest.mark.parametrize(
    "key", ["chat_template", "tokenizer", "tokenizer-mode", "hf-overrides.rope_theta", "config"]
)
def test_arguments_by_which_an_engine_would_read_otherwise_than_the_trainer_are_refused(
    key: str,
) -> None:
    with pytest.raises(ValidationError, match="than adapters are tuned with"):
        command(args={key: "x"})


def test_a_context_beyond_the_base_s_own_is_refused() -> None:
    with pytest.raises(EngineSettingsError, match=r"at most 8192 tokens"):
        command(max_model_len=8193)


def test_the_hub_is_off_for_the_bundled_model_only() -> None:
    argv_and_env = engine_command(Settings(), LAPTOP, BASE, port=1, api_key="k")
    assert argv_and_env[1]["HF_HUB_OFFLINE"] == "1"
    assert "HF_HUB_OFFLINE" not in command()[1]


@pytest.fixture
def engine(tmp_path: Path, tiny_base: Path) -> EngineProcess:
    settings = Settings(data=tmp_path / "data", model=ModelSettings(path=str(tiny_base)))
    settings.run_dir.mkdir(parents=True)
    return EngineProcess(settings, LAPTOP)


@pytest.fixture
def tiny_base(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    folder.mkdir()
    config = {
        "model_type": "llama",
        "max_position_embeddings": 512,
        "vocab_size": 300,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "burnish-model.json").write_text('{"revision": "r1"}')
    return folder


def test_a_started_engine_is_on_record_for_this_user_alone(
    engine: EngineProcess, tmp_path: Path
) -> None:
    run_dir = tmp_path / "data" / "run"
    assert read_engine_record(run_dir) is None
    launch = engine.prepare()
    engine.started(os.getpid())
    record = read_engine_record(run_dir)
    assert record is not None
    assert record.pid == os.getpid()
    assert record.base_name == "tiny"
    assert record.api_key == launch.environment["VLLM_API_KEY"]
    assert record.url.endswith(launch.argv[launch.argv.index("--port") + 1])
    assert stat.S_IMODE((run_dir / "engine.json").stat().st_mode) == 0o600


def test_the_engine_inherits_nothing_that_opens_the_gateway_or_its_database(
    engine: EngineProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("BURNISH_DATABASE__URL", "BURNISH_API_KEY", "PGPASSWORD"):
        monkeypatch.setenv(name, "hunter2")
    monkeypatch.setenv("HF_HOME", "/models")
    show = Launch(
        [sys.executable, "-c", "import signal; signal.pause()"], engine.prepare().environment
    )
    guard, link = start_guarded(show, output=None)
    with link:
        pid = int(link.recv(64))
        inherited = [Path(f"/proc/{of}/environ").read_bytes() for of in (guard.pid, pid)]
    guard.wait()
    for environment in inherited:
        assert b"HF_HOME=/models" in environment
        assert b"VLLM_API_KEY=" in environment
        assert b"BURNISH_" not in environment
        assert b"hunter2" not in environment


def test_every_start_has_its_own_key_and_boot_id(engine: EngineProcess, tmp_path: Path) -> None:
    seen = set()
    for _ in range(2):
        engine.prepare()
        engine.started(1)
        record = read_engine_record(tmp_path / "data" / "run")
        assert record is not None
        seen |= {record.api_key, record.boot_id}
    assert len(seen) == 4


def test_a_cpu_engine_is_not_started_without_the_operators_that_are_right(
    engine: EngineProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.prepare()
    monkeypatch.setattr("server.engines.cpu_lora.NAME", "not_there")
    with pytest.raises(EngineSettingsError, match="install Burnish"):
        engine.prepare()


@pytest.mark.parametrize(
    ("theirs", "loaded"), [(None, None), ("a,b", "a,b,burnish_cpu_lora"), ("", "burnish_cpu_lora")]
)
def test_a_choice_of_plugins_in_the_environment_keeps_ours(
    engine: EngineProcess, monkeypatch: pytest.MonkeyPatch, theirs: str | None, loaded: str | None
) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    if theirs is not None:
        monkeypatch.setenv("VLLM_PLUGINS", theirs)
    assert engine.prepare().environment.get("VLLM_PLUGINS") == loaded


@pytest.fixture
def health() -> Iterator[tuple[str, dict[str, int]]]:
    answer = {"status": 200}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(answer["status"])
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/health", answer
        server.shutdown()
        thread.join()


def test_only_200_counts_as_an_answer(
    health: tuple[str, dict[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, answer = health
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert answers_ok(url)
    answer["status"] = 503
    assert not answers_ok(url)
    assert not answers_ok(f"http://127.0.0.1:{free_port()}/health")


@pytest.mark.engine
def test_an_engine_killed_with_9_leaves_no_process_of_its_own(tmp_path: Path) -> None:
    """A killed API server leaves vLLM's engine core and worker running.

    They are processes of their own.
    """
    pytest.importorskip("vllm")
    from server.processes.children import Launch, start_guarded
    from tests.tiny_model import build_tiny_model

    model = build_tiny_model(tmp_path / "tiny")
    settings = Settings(data=tmp_path / "data", model=ModelSettings(path=str(model)))
    settings.run_dir.mkdir(parents=True)
    engine = EngineProcess(settings)
    launch = engine.prepare()
    with (tmp_path / "engine.log").open("wb") as log:
        guard, link = start_guarded(Launch(launch.argv, launch.environment), output=log)
    with link:
        pid = int(link.recv(64))
        engine.started(pid)
        waiting = threading.Event()
        for _ in range(1200):
            if engine.is_ready():
                break
            assert guard.poll() is None, (tmp_path / "engine.log").read_text()[-3000:]
            waiting.wait(0.2)
        family = _session_of(guard.pid) - {guard.pid}
        assert len(family) >= 3  # API server, engine core, worker
        os.kill(pid, signal.SIGKILL)
        assert guard.wait(timeout=30) == 128 + signal.SIGKILL
    assert not any(Path(f"/proc/{member}").exists() for member in family)


def _session_of(session: int) -> set[int]:
    found = set()
    for stat_file in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat_file.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[3]) == session:
            found.add(int(stat_file.parent.name))
    return found
