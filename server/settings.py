"""Every setting, with its default, its unit and what it may hold.

Built once, in the CLI, and passed down; nothing reads the environment later. Does not own: where
settings are read from and how a fault in them is told (`setting_sources.py`), what a deployment is
(rows in the database) or a tuning job's hyperparameters.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    model_validator,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from server.setting_sources import (
    Environment,
    File,
    as_database_url,
    as_engine_url,
    as_gateway_url,
    as_host,
    as_lower,
    as_path,
    as_secret,
    as_whole_number,
    build,
)

BUNDLED_MODEL = "smollm2-135m-instruct"

Folder = Annotated[Path, AfterValidator(as_path)]
Secret = Annotated[SecretStr, AfterValidator(as_secret)]
EngineUrl = Annotated[str, AfterValidator(as_engine_url)]
DatabaseUrl = Annotated[str, AfterValidator(as_database_url)]
LoraRank = Annotated[
    Literal[1, 8, 16, 32, 64, 128, 256, 320, 512], BeforeValidator(as_whole_number)
]
"""What vLLM takes as `--max-lora-rank`."""
LogLevel = Annotated[
    Literal["critical", "error", "warning", "info", "debug"], BeforeValidator(as_lower)
]

SETTINGS_OF_ARGS = {
    "api-key": "engine.api_key",
    "dtype": "engine.dtype",
    "enable-lora": None,
    "host": None,
    "max-cpu-loras": "engine.max_cpu_loras",
    "max-lora-rank": "engine.max_lora_rank",
    "max-loras": "engine.max_loras",
    "max-model-len": "engine.max_model_len",
    "model": "model.path",
    "port": "engine.port",
    "served-model-name": "model.name",
}
"""Options of vLLM that `[engine.args]` may not set, with the setting that does: the gateway counts
on what the settings say.
"""

PROMPT_ARGS = frozenset(
    {
        "chat-template",
        "chat-template-content-format",
        "code-revision",
        "config",
        "config-format",
        "default-chat-template-kwargs",
        "enable-prompt-embeds",
        "exclude-tools-when-tool-choice-none",
        "hf-config-path",
        "hf-overrides",
        "load-format",
        "revision",
        "skip-tokenizer-init",
        "tokenizer",
        "tokenizer-mode",
        "tokenizer-revision",
        "trust-request-chat-template",
    }
)
"""Options by which an engine would read prompts or weights otherwise than the trainer does."""


class Section(BaseModel):
    """A table of `burnish.toml`: an unknown key is an error that names it."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSettings(Section):
    """`[model]`: the base that the engine serves and adapters are trained on."""

    path: Annotated[str, AfterValidator(lambda given: str(as_path(Path(given))))] = Field(
        default=BUNDLED_MODEL,
        description="Directory of a model, a hub name (`org/name`), or the bundled "
        "`smollm2-135m-instruct`.",
    )
    name: str | None = Field(
        default=None, description="Public name of the base; default: last part of `path`."
    )
    revision: str | None = Field(
        default=None, description="Hub revision; recorded in every adapter."
    )

    @property
    def is_hub_name(self) -> bool:
        """Whether `path` is `org/name` of the model hub, and no directory here."""
        return (
            re.fullmatch(r"[\w.-]+/[\w.-]+", self.path) is not None and not Path(self.path).exists()
        )


class DatabaseSettings(Section):
    """`[database]`: SQLite in a file by default, or PostgreSQL."""

    url: DatabaseUrl | None = Field(
        default=None, description="SQLAlchemy URL; default: `sqlite:///DATA/burnish.sqlite3`."
    )
    direct_url: DatabaseUrl | None = Field(
        default=None,
        description="PostgreSQL itself, where `url` is a pooler's; default: `url`.",
    )

    @model_validator(mode="after")
    def _check_direct_url(self) -> Self:
        if self.direct_url is not None and not (
            self.direct_url.startswith("postgresql") and (self.url or "").startswith("postgresql")
        ):
            raise ValueError("database.direct_url is for PostgreSQL, and beside database.url")
        return self


class EngineSettings(Section):
    """`[engine]`: the managed vLLM child, or the addresses of servers that already run."""

    urls: list[EngineUrl] = Field(
        default=[], description="vLLM servers that already run; empty: manage one child."
    )
    api_key: Secret | None = Field(default=None, description="Key of those servers.")
    adapters_path: str | None = Field(
        default=None,
        description="The adapter store as those servers see it; default: `DATA/adapters`.",
    )
    port: int | None = Field(
        default=None, ge=1, le=65535, description="Child's port; default: a free one."
    )
    max_loras: int = Field(
        default=4, ge=1, le=256, description="Adapter slots; at least 3 per deployment + 1."
    )
    max_cpu_loras: int | None = Field(default=None, ge=1, description="Default: `max_loras`.")
    max_lora_rank: LoraRank = Field(
        default=16, description="Largest rank served: 1, 8, 16, 32, 64, 128, 256, 320 or 512."
    )
    dtype: str | None = Field(default=None, description="Default: float32 on a CPU, auto on a GPU.")
    max_model_len: int | None = Field(
        default=None, ge=64, description="Context in tokens; default: by machine."
    )
    kv_cache_gib: int | None = Field(
        default=None, ge=1, description="CPU KV cache in GiB; default: by memory."
    )
    threads: int | None = Field(
        default=None, ge=1, description="CPU threads of the engine; default: all cores."
    )
    start_timeout_seconds: float = Field(default=600.0, gt=0)
    tool_parser: str = Field(
        default="auto",
        min_length=1,
        description="vLLM's parser of tool calls: its name, `auto` (by the base's chat template) "
        "or `none`.",
    )
    args: dict[str, Any] = Field(
        default={},
        description="Handed to vLLM verbatim: `args.max-num-seqs = 16` is `--max-num-seqs 16`.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = {name.lstrip("-").replace("_", "-").removeprefix("no-") for name in self.args}
        for name in sorted(name for name in given if name.partition(".")[0] in PROMPT_ARGS):
            raise ValueError(
                f"[engine.args] may not hold {name!r}: the engine would serve by another template, "
                "tokenizer or configuration than adapters are tuned with; change the files in the "
                "directory of model.path, which is then another base"
            )
        for name in sorted(given & SETTINGS_OF_ARGS.keys()):
            setting = SETTINGS_OF_ARGS[name]
            advice = "Burnish sets it itself" if setting is None else f"set {setting} instead"
            raise ValueError(f"[engine.args] may not hold {name!r}: {advice}")
        if len(set(self.urls)) < len(self.urls):
            raise ValueError(f"engine.urls names a server twice: {', '.join(self.urls)}")
        return self

    @property
    def parses_tools(self) -> bool | None:
        """Whether the engines choose tools by themselves; None where they have to be asked."""
        return {"auto": None, "none": False}.get(self.tool_parser, True)


Origin = Annotated[str, Field(pattern=r"^https?://[^/?#*\s]+$")]

TASK_PROMPTS = (
    "### Task:\nGenerate ",
    "### Task:\nSuggest ",
    "### Task:\nAnalyze the chat history",
    "### Task:\nYou are an autocompletion system",
    "Your task is to reflect the speaker's likely facial expression",
)
"""How Open WebUI's calls for titles, tags, image prompts, follow-ups, queries, completions and
emoji begin. Its prompt for questions about documents begins with "### Task:" too, and is a chat.
"""


class GatewaySettings(Section):
    """`[gateway]`: limits of the API process."""

    max_body_bytes: int = Field(default=1024 * 1024, ge=1024)
    max_upload_bytes: int = Field(
        default=512 * 1024 * 1024, ge=1024, lt=2**31, description="Largest file of `/v1/files`."
    )
    max_stored_uploads: int | None = Field(
        default=1000, ge=1, description="Uploads that one user may keep."
    )
    max_stored_upload_bytes: int | None = Field(
        default=8 * 1024**3, ge=1024, description="What the uploads of one user may come to."
    )
    upload_memory_bytes: int = Field(
        default=1024**3, ge=512 * 1024**2, description="Memory that reading one upload may take."
    )
    upload_timeout_seconds: int = Field(
        default=300, ge=1, description="Then reading an upload ends, by the clock or processor."
    )
    max_choices: int = Field(default=8, ge=1, description="Largest `n` of a chat request.")
    strict: bool = Field(
        default=False, description="Refuse fields that would be ignored, instead of naming them."
    )
    commit_timeout_seconds: float = Field(
        default=5.0, gt=0, description="Then an answer ends as `not_recorded`."
    )
    engine_timeout_seconds: float = Field(
        default=600.0, gt=0, description="Longest silence of the engine."
    )
    max_connections: int = Field(
        default=1000,
        ge=1,
        description="Connections at once; one that waits or reads nothing gives way.",
    )
    head_timeout_seconds: float = Field(
        default=10.0, gt=0, description="Longest time for a request line and headers."
    )
    body_timeout_seconds: float = Field(
        default=30.0, gt=0, description="Time for a body, beside 1 s for each KiB of it."
    )
    write_timeout_seconds: float = Field(
        default=60.0,
        gt=0,
        description="Then a client that takes under 1 KiB/s of its reply is ended.",
    )
    keep_alive_timeout_seconds: float = Field(
        default=75.0, gt=0, description="How long a connection is kept for a next request."
    )
    refresh_seconds: float = Field(
        default=1.0, gt=0, description="How often keys and deployments are read again."
    )
    writer: Literal["process", "thread"] = Field(
        default="process",
        description="Where answers are written: a thread takes 60 MB less and is slower.",
    )
    drain_timeout_seconds: float = Field(
        default=60.0, ge=0, description="How long a shutdown waits for streams."
    )
    cors_origins: list[Origin] = Field(
        default=[], description="Web pages of these origins may call from a browser."
    )
    forwarded_allow_ips: list[str] = Field(
        default=[], description="Reverse proxies whose X-Forwarded-… headers are believed."
    )
    task_prompts: list[str] = Field(
        default=list(TASK_PROMPTS),
        description="A single user message that begins so is a front end's own call.",
    )
    conversation_headers: list[str] = Field(default=["X-OpenWebUI-Chat-Id"])
    user_headers: list[str] = Field(default=["X-OpenWebUI-User-Id"])


class LimitSettings(Section):
    """`[limits]`: what each key may do where it has no limits of its own."""

    requests_per_minute: int | None = Field(default=None, ge=1, description="Default: no limit.")
    tokens_per_minute: int | None = Field(
        default=None, ge=1, description="Prompts and answers together; default: no limit."
    )
    concurrent_requests: int | None = Field(
        default=None, ge=1, description="Requests that run at once; default: no limit."
    )
    unfinished_jobs: int | None = Field(
        default=50,
        ge=1,
        description="Jobs of one user that wait, run or are paused.",
    )


class TracingSettings(Section):
    """`[tracing]`: spans for OpenTelemetry. All else is said by its own `OTEL_…` variables."""

    enabled: bool = Field(
        default=False, description="Export spans of completions; needs the extra `otel`."
    )


class WorkerSettings(Section):
    """`[worker]`: background jobs and the trainer child."""

    lease_seconds: float = Field(
        default=30.0, gt=0, description="A job whose beat stands still so long is stalled."
    )
    poll_seconds: float = Field(default=1.0, gt=0)
    max_attempts: int = Field(default=3, ge=1)
    training_threads: int | None = Field(default=None, ge=1, description="Default: all cores.")
    gateway_url: Annotated[str, AfterValidator(as_gateway_url)] | None = Field(
        default=None, description="Default: the gateway of this machine."
    )
    api_key: Secret | None = Field(
        default=None, description="Internal key; default: DATA/run/internal.key."
    )


class Settings(BaseSettings):
    """All settings. `data` holds everything that Burnish writes."""

    model_config = SettingsConfigDict(
        env_prefix="BURNISH_",
        env_nested_delimiter="__",
        extra="forbid",
        frozen=True,
    )

    data: Folder = Path("data")
    host: Annotated[str, AfterValidator(as_host)] = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    deployment: str = Field(
        default="assistant",
        pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$",
        description="Name of the deployment made on the first start.",
    )
    secret: Secret | None = Field(
        default=None,
        description="What feedback tokens and the audit log are signed with; default: DATA/secret.",
    )
    bootstrap_key: Secret | None = Field(
        default=None, description="First admin key, instead of a random one."
    )
    log_level: LogLevel = "info"
    model: ModelSettings = ModelSettings()
    database: DatabaseSettings = DatabaseSettings()
    engine: EngineSettings = EngineSettings()
    gateway: GatewaySettings = GatewaySettings()
    limits: LimitSettings = LimitSettings()
    tracing: TracingSettings = TracingSettings()
    worker: WorkerSettings = WorkerSettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, environment, then the file `BURNISH_CONFIG` or `./burnish.toml`."""
        return init_settings, Environment(settings_cls), File(settings_cls)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}", self.base_name) is None:
            raise ValueError(
                f"the model's public name would be {self.base_name!r}, after its directory, and "
                "clients could not ask for it; set model.name to one of letters, digits and ._:/-"
            )
        if self.base_name == self.deployment:
            raise ValueError(
                f"the model and the deployment would both be called {self.deployment!r}: "
                "set model.name to another name"
            )
        if self.engine.port is not None and self.engine.port == self.port:
            raise ValueError(f"port and engine.port are both {self.port}: give the engine another")
        return self

    @property
    def database_url(self) -> str:
        """SQLAlchemy URL of the database."""
        return self.database.url or f"sqlite:///{self.data.resolve() / 'burnish.sqlite3'}"

    @property
    def run_dir(self) -> Path:
        """`engine.json`, lock files and internal keys; 0700."""
        return self.data / "run"

    @property
    def log_dir(self) -> Path:
        return self.data / "logs"

    @property
    def adapters_dir(self) -> Path:
        """The content-addressed adapter store."""
        return self.data / "adapters"

    @property
    def datasets_dir(self) -> Path:
        return self.data / "datasets"

    @property
    def jobs_dir(self) -> Path:
        """One directory per tuning job: its configuration, checkpoints, output."""
        return self.data / "jobs"

    @property
    def model_dir(self) -> Path:
        """Local directory of the base.

        The bundled model, and those of the hub, are made under `DATA/models`.
        """
        if self.model.path == BUNDLED_MODEL or self.model.is_hub_name:
            return self.data / "models" / self.model.path.replace("/", "--")
        return Path(self.model.path)

    @property
    def base_name(self) -> str:
        """Public name of the base model."""
        return self.model.name or Path(self.model.path).name.lower()


def load_settings(**flags: Any) -> Settings:
    """Build the settings; `flags` that are None count as not given.

    Raises `SystemExit` with one line per fault: the key, where it was read, what was found, what
    was expected.
    """
    return build(Settings, flags)
