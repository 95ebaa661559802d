"""The server's configuration: one YAML file, the environment over it, flags over both.

Every key of ServerConfig is a YAML key, an environment variable GPTOSS_<KEY> and a flag --<key-with-dashes>. What is
not set takes the profile's value where the profile has one, else the default.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from gptoss.config_text import (
    Parser,
    check_key_text,
    masked_value,
    quoted_value,
    read_yaml,
    shown_name,
    without_secrets,
    yaml_problem,
)
from gptoss.engine.config import ConfigError
from gptoss.profiles import PROFILES, Profile, ProfileName, overridden

DEFAULT_CONFIG_FILE = Path(__file__).resolve().parents[1] / "configs" / "server_config.yaml"
ENV_PREFIX = "GPTOSS_"
# Names that operators know from elsewhere, below our own.
FOREIGN_ENV = {"TORCH_DTYPE": "dtype"}
# Read by our other programs (the command-line client, the tests), not by the server.
OTHER_PROGRAMS_ENV = frozenset({"GPTOSS_CONFIG", "GPTOSS_URL", "GPTOSS_TEST_CACHE"})
# Kubernetes describes every Service of a namespace to its pods, here those named gptoss or gptoss-<something>.
_KUBERNETES_ENV = re.compile(
    r"GPTOSS(_[A-Z0-9_]+)?"
    r"(_SERVICE_HOST|_SERVICE_PORT(_[A-Z0-9_]+)?|_PORT_\d+_(TCP|UDP|SCTP)(_PORT|_PROTO|_ADDR)?)"
)
_KUBERNETES_PORT = re.compile(r"GPTOSS(_[A-Z0-9_]+)?_PORT")
# Keys whose default is the profile's value.
PROFILE_KEYS = ("max_num_seqs", "max_num_batched_tokens", "max_num_waiting", "batch_invariant")
_HOST_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*)|[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*")
# Keys whose value is never quoted in an error.
SECRET_KEYS = ("api_key", "api_keys_file", "otlp_endpoint")


class ServerConfig(BaseSettings):
    """Frozen once made. Counts are tokens unless the name says otherwise."""

    model_config = SettingsConfigDict(
        extra="forbid", frozen=True, env_prefix=ENV_PREFIX, protected_namespaces=(), populate_by_name=True
    )

    # serving
    host: str = Field("127.0.0.1", description="address to bind")
    port: int = Field(8000, ge=0, le=65535, description="port to bind")
    auto_port: bool = Field(False, description="take the next free port if this one is taken")
    force_port: bool = Field(False, description="end the server of ours that has the port; never anything else")
    max_body_bytes: int = Field(16 * 2**20, ge=1024, description="largest request body, bytes")
    response_store_bytes: int = Field(64 * 2**20, ge=0, description="stored responses of /v1/responses, bytes; 0: none")
    unknown_fields: Literal["ignore", "warn", "reject"] = Field(
        "warn", description="of requests: warn is one log line for each client and field, reject a 400"
    )
    keep_alive_s: float = Field(15.0, gt=0, description="a comment line on every stream this often, s")
    send_timeout_s: float = Field(60.0, gt=0, description="time for a client to take the next part of an answer, s")
    body_timeout_s: float = Field(30.0, gt=0, description="time for a request's body to arrive, s")
    header_timeout_s: float = Field(10.0, gt=0, description="time for a request's headers to arrive, s")
    max_header_bytes: int = Field(32_768, ge=1024, description="largest sum of a request's headers, bytes")
    max_connections: int = Field(
        4096,
        ge=1,
        description="open at once, as far as open files are allowed; more get a 503, but for /health and /ready",
    )
    max_connections_per_address: int = Field(
        0, ge=0, description="open at once; a proxy in front is one address; 0: no limit"
    )
    warm_up: bool = Field(True, description="a first request of our own before /ready says so")
    drain_timeout_s: float = Field(30.0, ge=0, description="time for running requests at shutdown, s")

    # access
    api_key: SecretStr | None = Field(None, description="the key that every request must carry; unset: open")
    api_keys_file: Path | None = Field(
        None, description="YAML list of keys: name, key or sha256, and limits; read again on SIGHUP"
    )
    requests_per_minute: int = Field(0, ge=0, description="of a key, or of all without keys; 0: no limit")
    tokens_per_minute: int = Field(0, ge=0, description="prompt and answer, of a key; 0: no limit")
    max_concurrent_requests: int = Field(0, ge=0, description="of a key; 0: no limit")
    public_metrics: bool = Field(False, description="/metrics without a key")
    public_page: bool = Field(True, description="the page at / without a key; what it asks for needs one")
    debug_endpoints: bool = Field(False, description="/docs, /redoc, /openapi.json and /v1/chat/completions/render")
    require_api_key: bool = Field(False, description="do not start without a key")
    allowed_hosts: list[str] | None = Field(
        None,
        description="names in the Host header beside localhost; unset: none on a loopback host, else any; ['*']: any",
    )
    require_json_content_type: bool = Field(True, description="a body must come with Content-Type: application/json")
    shared_prefix_cache: bool = Field(False, description="reuse the cache of equal prompt beginnings across keys too")
    cors_origins: list[str] = Field([], description="origins of browsers that may ask; empty: none")

    # model
    profile: ProfileName = Field("balanced", description="latency_first, balanced or quality_first")
    profiles: dict[ProfileName, dict[str, Any]] = Field(
        {}, description="changes to profiles, as in {latency_first: {max_num_seqs: 4}}"
    )
    model: str | None = Field(None, description="20b, 120b, nano, a folder, or a Hub id; unset: the profile's, or nano")
    model_path: Path | None = Field(None, description="folder of the checkpoint, or a folder that holds it by name")
    served_model_name: str | None = Field(None, description="name in /v1/models; unset: gpt-oss-<size>")
    load_format: Literal["auto", "dummy"] = Field("auto", description="dummy: random weights, no file")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field("auto", description="type of weights and cache")
    gpu_dtypes: dict[str, Literal["bfloat16", "float16", "float32"]] = Field(
        {
            "V100": "float16",
            "RTX 3090": "float16",
            "RTX 4090": "bfloat16",
            "A100": "bfloat16",
            "H100": "bfloat16",
            "H200": "bfloat16",
        },
        description="type that dtype auto takes on a GPU whose name holds the key; others by capability",
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    backend: Literal["native", "transformers"] = Field(
        "native", description="transformers: the reference, slower, for hardware that native does not know"
    )
    gpu_mode: Literal["auto", "single", "pipeline", "tensor"] = Field(
        "auto", description="how the model is laid over GPUs; auto: by free memory"
    )
    tensor_parallel_size: int = Field(0, ge=0, le=64, description="ranks that share each layer; 0: as gpu_mode needs")
    pipeline_parallel_size: int = Field(
        0, ge=0, le=64, description="stages of consecutive layers; 0: as gpu_mode needs"
    )
    enable_expert_parallel: bool = Field(
        False, description="tensor-parallel ranks hold whole experts instead of a part of each"
    )

    # engine
    max_model_len: int | None = Field(None, ge=64, description="prompt and answer together; unset: the model's")
    max_num_seqs: int | None = Field(None, ge=1, le=1024, description="requests in one step; unset: the profile's")
    max_num_batched_tokens: int | None = Field(None, ge=1, description="tokens in one step; unset: the profile's")
    max_num_waiting: int | None = Field(None, ge=0, description="requests that may wait; unset: the profile's")
    max_num_waiting_tokens: int = Field(1_000_000, ge=1, description="prompt tokens that may wait")
    batch_invariant: bool | None = Field(None, description="same tokens alone and under load; unset: the profile's")
    num_speculative_tokens: int = Field(
        -1, ge=-1, le=16, description="guesses checked in one step; 0: none; -1: 3 on a CPU, none on GPUs"
    )
    enforce_eager: bool = Field(False, description="GPU: run decode steps kernel by kernel instead of from CUDA graphs")
    block_size: int = Field(64, ge=1, description="tokens in a KV block, a power of two")
    enable_prefix_caching: bool = Field(True, description="reuse the cache of equal prompt beginnings")
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1, description="share of the GPU's memory, 0..1")
    cpu_kv_cache_gib: float = Field(1.0, gt=0, description="size of the KV cache on the CPU, GiB")
    num_threads: int = Field(0, ge=0, description="compute threads on the CPU; 0: one for each physical core")
    cpu_isa: Literal["auto", "avx2", "avx512"] = Field(
        "auto", description="instruction set of the CPU kernels: auto (the best), avx2, avx512"
    )
    priority_ageing_s: float = Field(5.0, gt=0, description="waiting time worth one priority step, s")
    engine_step_timeout_s: float = Field(
        300.0, gt=0, description="no step, or no heartbeat, for this long: the engine is dead, s"
    )
    engine_heartbeat_timeout_s: float = Field(
        10.0, gt=1, description="no heartbeat of the engine for this long: /ready is 503, s"
    )
    max_engine_restarts: int = Field(5, ge=0, description="restarts in a row before giving up")
    max_request_resumes: int = Field(
        0,
        ge=0,
        description="how often a request goes on in the next engine when its engine dies; 0: it ends with an error",
    )
    seed: int = Field(0, description="seed of random weights")

    # prompts and answers
    guided_harmony: bool = Field(True, description="only well-formed Harmony can be sampled")
    guided_tool_arguments: bool = Field(
        True, description="with guided_harmony: tools' arguments follow their schema without strict too"
    )
    reasoning_fields: Literal["both", "reasoning_content", "reasoning"] = Field(
        "both", description="name of the reasoning in answers"
    )
    replay_generated_ids: bool | None = Field(
        None, description="write history with the ids that were generated; unset: unless batch_invariant"
    )
    repetition_guard: int | None = Field(
        None,
        ge=0,
        le=1000,
        description="end a message, string or array that repeats itself this often; 0: off; unset: 16 for nano",
    )
    current_date: str | None = Field(None, description="date in the system message; unset: none, so prompts never age")
    prompt_cache_bytes: int = Field(64 * 2**20, ge=0, description="rendered prompts kept, bytes")
    prompt_cache_ttl_s: float = Field(3600.0, gt=0, description="and for how long after their last use, s")

    # logs and metrics
    log_format: Literal["text", "json"] = Field("text", description="lines for people, or JSON")
    log_content: bool = Field(False, description="prompts and answers in the log of requests")
    otlp_endpoint: str | None = Field(
        None, description="OTLP/HTTP collector for a span of each request; unset: no tracing"
    )
    vllm_metric_names: bool = Field(True, description="metrics also under vLLM's names, for dashboards made for it")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severity logged")

    @field_validator("gpu_dtypes", "profiles", "cors_origins", "allowed_hosts", mode="before")
    @classmethod
    def _table(cls, value: Any) -> Any:
        """In a flag or the environment the table is written as in YAML."""
        if not isinstance(value, str):
            return value
        try:
            return yaml.safe_load(value)
        except (yaml.YAMLError, RecursionError) as error:
            raise ValueError(f"not valid YAML{yaml_problem(error)}") from None

    @field_validator("api_key")
    @classmethod
    def _usable_key(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            check_key_text(value.get_secret_value())
        return value

    @field_validator("host")
    @classmethod
    def _without_brackets(cls, value: str) -> str:
        """An IPv6 address may be written as in a URL."""
        return value[1:-1] if value.startswith("[") and value.endswith("]") else value

    @field_validator("allowed_hosts")
    @classmethod
    def _host_names(cls, value: list[str] | None) -> list[str] | None:
        for name in value or ():
            if name != "*" and not _HOST_NAME.fullmatch(name):
                raise ValueError(f"{name!r} is not a host name or address: leave out scheme, port and path")
        return value

    @field_validator("current_date")
    @classmethod
    def _iso_date(cls, value: str | None) -> str | None:
        import datetime

        if value is not None:
            datetime.date.fromisoformat(value)
        return value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)  # load_config merges the sources itself, to know where each value came from

    @model_validator(mode="after")
    def _no_contradictions(self) -> ServerConfig:
        if self.auto_port and self.force_port:
            raise ValueError("auto_port and force_port contradict each other: drop one of them")
        if self.backend == "transformers" and self.load_format == "dummy":
            raise ValueError("backend 'transformers' needs a checkpoint: drop load_format 'dummy'")
        self.all_profiles()
        return self

    @property
    def active_profile(self) -> Profile:
        return self.all_profiles()[self.profile]

    def all_profiles(self) -> dict[str, Profile]:
        """The profiles with the operator's changes. Raises ValueError for a change that cannot be."""
        changes: Mapping[str, dict[str, Any]] = {str(k): v for k, v in self.profiles.items()}
        return {name: overridden(PROFILES[name], changes.get(name, {})) for name in PROFILES}

    def resolved(self, key: str) -> Any:
        """A key's value, the profile's where the operator said nothing."""
        value = getattr(self, key)
        return getattr(self.active_profile, key) if value is None and key in PROFILE_KEYS else value


def load_config(argv: list[str] | None = None) -> tuple[ServerConfig, dict[str, str], bool]:
    """-> (configuration, where each set key came from, whether --print-config was given).

    Raises:
        ConfigError: an unknown key or a value that cannot be; the message names the key and its source.
    """
    parser = _parser()
    flags = {k: v for k, v in vars(parser.parse_args(argv)).items() if v is not None}
    print_config = flags.pop("print_config", False)
    path = Path(flags.pop("config", None) or os.environ.get(f"{ENV_PREFIX}CONFIG") or DEFAULT_CONFIG_FILE)
    environment = _from_environment()
    merged: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for key, value in _from_yaml(path).items():
        merged[key], origin[key] = value, str(path)
    for key, (name, value) in environment.items():
        merged[key], origin[key] = value, f"environment {name}"
    for key, value in flags.items():
        merged[key], origin[key] = value, "flag"
    _check_text(merged, origin)
    try:
        return ServerConfig(**merged), origin, print_config
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0]) if first["loc"] else "configuration"
        hint = f"known keys: {', '.join(ServerConfig.model_fields)}" if first["type"] == "extra_forbidden" else ""
        message = "unknown key" if hint else first["msg"].removeprefix("Value error, ")
        if key == "api_key" and first["type"] == "string_type":
            message += ": put the key in quotes"
        if len(first["loc"]) == 1 and not hint and key not in SECRET_KEYS:
            message += quoted_value(first["input"])
        name = shown_name(key) if hint else key
        raise ConfigError(
            f"{name} (from {origin.get(key, 'defaults')}): {without_secrets(message)}. {hint}".rstrip()
        ) from None


def _check_text(values: Mapping[str, Any], origin: Mapping[str, str]) -> None:
    """Raises ConfigError for bytes in the environment or a flag that are not UTF-8, and for a name of no file."""
    for key, value in values.items():
        if isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError:
                raise ConfigError(f"{key} (from {origin[key]}) is not UTF-8 text") from None
    file = values.get("api_keys_file")
    if isinstance(file, str) and not file.strip():
        raise ConfigError(f"api_keys_file (from {origin['api_keys_file']}) is empty: name a file, or unset it")


def describe(config: ServerConfig, origin: dict[str, str]) -> str:
    """The result and where each value came from, as YAML."""
    lines = []
    for key in ServerConfig.model_fields:
        value = config.resolved(key)
        if key in PROFILE_KEYS and getattr(config, key) is None:
            source = f"profile {config.profile}"
        else:
            source = origin.get(key, "default")
        text = (
            yaml.safe_dump(
                masked_value(str(value) if isinstance(value, (Path, SecretStr)) else value),
                default_flow_style=True,
                width=10_000,
            )
            .removesuffix("...\n")
            .strip()
        )
        lines.append(f"{key}: {text}  # {source}")
    return "\n".join(lines) + "\n"


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="server", description="Serves gpt-oss-20b and gpt-oss-120b to OpenAI clients.", allow_abbrev=False
    )
    parser.add_argument("--config", help="YAML file (default: configs/server_config.yaml)")
    parser.add_argument("--print-config", action="store_const", const=True, help="show the result and leave")
    for name, info in ServerConfig.model_fields.items():
        flag = "--" + name.replace("_", "-")
        text = (info.description or "").replace("%", "%%")
        if info.annotation in (bool, bool | None):
            parser.add_argument(flag, dest=name, action=_BooleanFlag, help=text)
        else:
            parser.add_argument(flag, dest=name, default=None, help=text)
    return parser


class _BooleanFlag(argparse.BooleanOptionalAction):
    """`--flag`, `--no-flag`, and `--flag VALUE` with a value as in YAML."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:
        super().__init__(option_strings, dest, default=None, help=help)
        self.nargs, self.metavar = "?", "true|false"

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        negated = option_string is not None and option_string.startswith("--no-")
        if values is None:
            setattr(namespace, self.dest, not negated)
            return
        if negated:
            parser.error(f"argument {option_string}: takes no value, got {values!r}")
        if values.lower() not in _BOOLEANS:
            parser.error(f"argument {option_string}: must be true or false, got {values!r}")
        setattr(namespace, self.dest, _BOOLEANS[values.lower()])


_BOOLEANS = {**dict.fromkeys(("true", "yes", "on", "1"), True), **dict.fromkeys(("false", "no", "off", "0"), False)}


def _from_yaml(path: Path) -> dict[str, Any]:
    values = read_yaml(path, str(path))
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold keys and values")
    blank = re.search(r"(?m)^(api_keys?(?:_file)?):[ \t]*(&\S*)?[ \t]*(#.*)?$", path.read_text(encoding="utf-8"))
    if blank is not None and values.get(blank[1]) is None:
        raise ConfigError(f"{blank[1]} (from {path}) has no value: write null to serve without it")
    return {str(key): value for key, value in values.items() if value is not None}


def _from_environment() -> dict[str, tuple[str, str]]:
    """Key -> (the variable's name, its text)."""
    values = {key: (name, os.environ[name]) for name, key in FOREIGN_ENV.items() if name in os.environ}
    for name, value in os.environ.items():
        if not name.startswith(ENV_PREFIX) or name in OTHER_PROGRAMS_ENV:
            continue
        if _describes_a_service(name, value):
            continue
        key = name.removeprefix(ENV_PREFIX).lower()
        if key not in ServerConfig.model_fields:
            raise ConfigError(f"environment variable {name}: unknown key {key!r}")
        values[key] = name, value
    return values


def service_variables() -> list[str]:
    """Names of the variables that Kubernetes set for Services and that the configuration ignores."""
    return sorted(name for name, value in os.environ.items() if _describes_a_service(name, value))


def _describes_a_service(name: str, value: str) -> bool:
    """Whether Kubernetes set the variable. Our port is a number, a Service's is an address."""
    if _KUBERNETES_ENV.fullmatch(name):
        return True
    is_address = value.startswith(("tcp://", "udp://", "sctp://"))
    return is_address and _KUBERNETES_PORT.fullmatch(name) is not None
