"""ServerSettings: what `hexad serve` was asked for, by flags, HEXAD_* variables and a TOML file."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from hexad.checks import shown
from hexad.errors import ConfigError
from hexad.server.parsers.formats import TOOL_FORMATS


def _listed(value: Any) -> Any:
    """A list of one for a value by itself; variables separate several with commas."""
    return [item for item in value.split(",") if item] if isinstance(value, str) else value


def _template(value: str | None) -> str | None:
    """A template's text: itself, or what the file of that name holds."""
    if value is None or "{" in value or "\n" in value:
        return value
    try:
        return Path(value).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"it is no Jinja template, and no file of that name can be read: {error}") from error


def _root(value: str) -> str:
    """A path without its last slash."""
    if value and not value.startswith("/"):
        raise ValueError("it must begin with /")
    return value.rstrip("/")


Listed = Annotated[list[str], BeforeValidator(_listed)]


class ServerSettings(BaseModel):
    """Settings of one server. The names are the flags', which say what each of them is.

    api_keys: bearers of any of them may enter; empty: anybody. max_waiting: sequences that may wait beyond
    those that run; more are answered 429. request_timeout: seconds after which a request is ended.
    timeout_graceful: seconds that running requests get to end after SIGTERM. body_timeout: seconds in which a
    body must come. max_body_mib: longest body. max_grammar_kib: longest grammar or schema. max_n: most
    continuations of one request, over all its prompts. max_stored_responses, max_stored_mib: how many
    responses are kept to be asked for again or gone on from, and how long all together.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = "smollm2:135m"
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    uds: str | None = None
    root_path: Annotated[str, AfterValidator(_root)] = ""
    api_key: Listed = []
    api_key_file: Path | None = None
    served_model_name: Listed = []
    chat_template: Annotated[str | None, AfterValidator(_template)] = None
    tool_call_parser: str = "auto"
    reasoning_parser: Literal["auto", "think", "none"] = "auto"
    generation_config: Literal["auto", "vllm"] = "auto"
    ssl_certfile: Path | None = None
    ssl_keyfile: Path | None = None
    ssl_keyfile_password: str | None = None
    ssl_ca_certs: Path | None = None
    cors: Listed = []
    max_waiting: Annotated[int, Field(ge=0)] = 1024
    max_n: Annotated[int, Field(ge=1)] = 128
    max_stored_responses: Annotated[int, Field(ge=0)] = 1024
    max_stored_mib: Annotated[float, Field(ge=0)] = 64.0
    max_body_mib: Annotated[float, Field(gt=0)] = 16.0
    max_grammar_kib: Annotated[float, Field(gt=0)] = 256.0
    request_timeout: Annotated[float, Field(gt=0)] = 600.0
    body_timeout: Annotated[float, Field(gt=0)] = 60.0
    timeout_graceful: Annotated[float, Field(ge=0)] = 30.0
    timeout_keep_alive: Annotated[int, Field(ge=0)] = 5
    log_format: Literal["text", "json"] = "text"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    otlp_endpoint: str | None = None

    # The engine's own, which EngineConfig checks.
    threads: int | None = None
    compute: Literal["int8", "float"] = "int8"
    kv_dtype: Literal["auto", "f32", "f16", "q8"] = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    max_step_ms: float | None = None
    kv_cache_gib: float | None = None
    enable_prefix_caching: bool = True
    scheduling_policy: Literal["fcfs", "priority"] = "fcfs"
    prefault: bool = True
    max_logprobs: int = 20
    seed: int | None = None

    @field_validator("tool_call_parser")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in ("auto", *TOOL_FORMATS):
            raise ValueError(f"it must be auto or one of {', '.join(TOOL_FORMATS)}")
        return name

    @model_validator(mode="after")
    def _whole(self) -> ServerSettings:
        if self.ssl_certfile is None and (self.ssl_keyfile or self.ssl_ca_certs):
            raise ValueError("ssl_keyfile and ssl_ca_certs need an ssl_certfile")
        return self

    @property
    def engine(self) -> dict[str, Any]:
        """The fields of EngineConfig."""
        return {name: getattr(self, name) for name in _ENGINE}

    @property
    def api_keys(self) -> frozenset[str]:
        """All keys. Raises ConfigError where the file of keys cannot be read, or has none."""
        keys = set(self.api_key)
        if self.api_key_file is not None:
            try:
                lines = self.api_key_file.read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"api_key_file {self.api_key_file} cannot be read: {error}.") from error
            found = {line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")}
            if not found:  # an open door instead of a locked one
                raise ConfigError(f"api_key_file {self.api_key_file} has no keys; write one per line.")
            keys |= found
        return frozenset(keys)


_SECRET = {"api_key", "ssl_keyfile_password"}

_ENGINE = (
    "threads", "compute", "kv_dtype", "max_model_len", "max_num_seqs", "max_num_batched_tokens",
    "max_step_ms", "kv_cache_gib", "enable_prefix_caching", "scheduling_policy", "prefault", "max_logprobs",
    "seed",
)  # fmt: skip


def collect(
    flags: Mapping[str, Any], environment: Mapping[str, str], config: Path | None = None
) -> ServerSettings:
    """Settings from the command line, or else HEXAD_NAME variables, or else a TOML file, or else defaults.

    The file's keys are the flags', with - or _; HEXAD_CONFIG may name it. Raises ConfigError, which says
    where a value is from.
    """
    if config is None and (named := environment.get("HEXAD_CONFIG")):
        config = Path(named)
    given: dict[str, Any] = {}
    sources: dict[str, str] = {}

    def take(values: Mapping[str, Any], source: str) -> None:
        given.update(values)
        sources.update(dict.fromkeys(values, source))

    if config is not None:
        try:
            table = tomllib.loads(config.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"The settings in {config} cannot be read: {error}.") from error
        take({key.replace("-", "_"): value for key, value in table.items()}, str(config))
    variables = {name: f"HEXAD_{name.upper()}" for name in ServerSettings.model_fields}
    take(
        {name: environment[variable] for name, variable in variables.items() if environment.get(variable)},
        "the environment",
    )
    take(flags, "the command line")
    try:
        return ServerSettings.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].removeprefix("Value error, ")
        if not first["loc"]:
            raise ConfigError(f"{message}.") from error
        name = str(first["loc"][0])
        if first["type"] == "extra_forbidden":
            raise ConfigError(
                f"There is no setting {name!r} (from {sources[name]}); the settings are "
                f"{', '.join(sorted(ServerSettings.model_fields))}."
            ) from error
        value = "" if name in _SECRET else f" is {shown(given.get(name))}"
        raise ConfigError(f"{name} (from {sources.get(name)}){value}: {message}.") from error
