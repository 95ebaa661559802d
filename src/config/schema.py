"""Every key of the server's configuration: one line with its type, default, description and bounds.

The YAML file, the flags, the environment variables and docs/configuration.md are made from these groups. The unit is in
a key's name (_s, _bytes, _gib); other counts are tokens unless the description says otherwise.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import ConfigDict, SecretStr, field_validator, model_validator
from pydantic.dataclasses import dataclass as validated_dataclass
from pydantic.fields import FieldInfo

from gptoss.config.engine_keys import DeviceKeys, EngineKeys, LoraKeys
from gptoss.config.key import key
from gptoss.config.profiles import PROFILES, Profile, ProfileName, overridden
from gptoss.config.python_keys import PythonKeys
from gptoss.config.text import check_key_text, yaml_problem
from gptoss.config.tool_keys import ToolKeys, check_domains, check_networks, mcp_entries

ENV_PREFIX = "GPTOSS_"
_HOST_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*)|[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServingKeys:
    """serving"""

    host: str = key("127.0.0.1", "address to listen on")
    port: int = key(8000, "port to listen on; 0: any free port", ge=0, le=65535)
    auto_port: bool = key(False, "use the next free port if this one is taken")
    force_port: bool = key(False, "stop our own server if it holds the port; other programs are left alone")
    max_body_bytes: int = key(16 * 2**20, "largest request body", ge=1024)
    response_store_bytes: int = key(64 * 2**20, "memory for stored responses of /v1/responses; 0: none", ge=0)
    unknown_fields: Literal["ignore", "warn", "reject"] = key(
        "warn", "unknown request fields; warn: log each field once per client; reject: answer 400"
    )
    keep_alive_s: float = key(15.0, "interval between keep-alive comments on a stream", gt=0)
    send_timeout_s: float = key(60.0, "time for a client to accept the next part of an answer", gt=0)
    body_timeout_s: float = key(30.0, "time for a request body to arrive", gt=0)
    header_timeout_s: float = key(10.0, "time for request headers to arrive", gt=0)
    max_header_bytes: int = key(32_768, "largest total size of a request's headers", ge=1024)
    max_connections: int = key(
        4096, "open connections, at most what the open-file limit allows; beyond: 503, except /health and /ready", ge=1
    )
    max_connections_per_address: int = key(
        0, "open connections from one address, which is the proxy's if there is one; 0: no limit", ge=0
    )
    warm_up: bool = key(True, "send a warm-up request before reporting ready")
    drain_timeout_s: float = key(30.0, "time for running requests to finish at shutdown", ge=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AccessKeys:
    """access"""

    api_key: SecretStr | None = key(None, "key that every request must carry; unset: none is required", secret=True)
    api_keys_file: Path | None = key(
        None, "YAML list of keys (name, key or sha256, limits), read again on SIGHUP", secret=True
    )
    requests_per_minute: int = key(0, "limit per key, or for all clients together without keys; 0: no limit", ge=0)
    tokens_per_minute: int = key(0, "limit of prompt and output per key; 0: no limit", ge=0)
    max_concurrent_requests: int = key(0, "limit per key; 0: no limit", ge=0)
    tool_calls_per_minute: int = key(0, "limit per key of calls of tools that the server runs; 0: no limit", ge=0)
    public_metrics: bool = key(False, "serve /metrics without a key")
    public_page: bool = key(True, "serve the page at / without a key; its requests still need one")
    debug_endpoints: bool = key(False, "serve /docs, /redoc, /openapi.json and /v1/chat/completions/render")
    require_api_key: bool = key(False, "refuse to start without a key")
    allowed_hosts: list[str] | None = key(
        None, "Host headers accepted besides localhost; unset: none if host is a loopback address, else any; ['*']: any"
    )
    require_json_content_type: bool = key(True, "require Content-Type: application/json on request bodies")
    shared_prefix_cache: bool = key(False, "share cached prompt prefixes between keys")
    cors_origins: list[str] = key([], "browser origins that may call the API; empty: none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelKeys:
    """model"""

    profile: ProfileName = key("balanced", "named limits, effort and sampling defaults")
    profiles: dict[ProfileName, dict[str, Any]] = key({}, "changes to profiles: {latency_first: {max_num_seqs: 4}}")
    model: str | None = key(
        None,
        "20b, 120b, nano, a folder, a GGUF file, ollama:NAME or a Hub id; unset: the profile's on a GPU, else nano",
    )
    model_path: Path | None = key(None, "folder or GGUF file of the model, or a folder that contains it by name")
    served_model_name: str | None = key(None, "name in /v1/models; unset: gpt-oss-<size>")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptKeys:
    """prompts and answers"""

    guided_harmony: bool = key(True, "allow only well-formed Harmony to be sampled")
    guided_tool_arguments: bool = key(
        True, "make tool arguments follow their schema even without strict; requires guided_harmony"
    )
    reasoning_fields: Literal["both", "reasoning_content", "reasoning"] = key("both", "names of the reasoning field")
    replay_generated_ids: bool | None = key(
        None, "render history with the token ids that were generated; unset: unless batch_invariant"
    )
    repetition_guard: int | None = key(
        None, "end a message, string or array that repeats itself this often; 0: off; unset: the model's", ge=0, le=1000
    )
    current_date: str | None = key(None, "YYYY-MM-DD for the system message; unset: none, so prompts stay cacheable")
    prompt_cache_bytes: int = key(64 * 2**20, "memory for rendered prompts", ge=0)
    prompt_cache_ttl_s: float = key(3600.0, "time that a rendered prompt is kept after its last use", gt=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchKeys:
    """batches"""

    batch_dir: Path | None = key(None, "folder for the files of /v1/files and /v1/batches; unset: both are off")
    batch_max_file_bytes: int = key(200 * 2**20, "largest uploaded file", ge=1024)
    batch_quota_bytes: int = key(2 * 2**30, "files that one key may keep, answers included", ge=1024)
    batch_expiry_s: float = key(86_400.0, "time for a batch to be answered, completion_window 24h", gt=0)
    batch_retention_s: float = key(
        30 * 86_400.0, "time that files are kept unless expires_after is set, and batches after their end", ge=60
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogKeys:
    """logs and metrics"""

    log_format: Literal["text", "json"] = key("text", "lines of text, or of JSON")
    log_content: bool = key(False, "include prompts and answers in the request log")
    otlp_endpoint: str | None = key(
        None, "OTLP/HTTP collector that receives a span per request; unset: no tracing", secret=True
    )
    vllm_metric_names: bool = key(True, "also export metrics under vLLM's names, for dashboards made for vLLM")
    log_level: Literal["debug", "info", "warning", "error"] = key("info", "lowest severity that is logged")


GROUPS = (
    ServingKeys,
    AccessKeys,
    ModelKeys,
    DeviceKeys,
    EngineKeys,
    LoraKeys,
    PromptKeys,
    ToolKeys,
    BatchKeys,
    PythonKeys,
    LogKeys,
)
FIELDS = [item for group in GROUPS for item in dataclasses.fields(group)]
PROFILE_KEYS = tuple(item.name for item in FIELDS if item.metadata["from_profile"])
SECRET_KEYS = tuple(item.name for item in FIELDS if item.metadata["secret"])
PATHS_KEYS = tuple(item.name for item in FIELDS if item.type == "dict[str, Path]")
TABLE_KEYS = tuple(
    item.name for item in FIELDS if str(item.type).startswith(("list[", "dict[")) and item.name not in PATHS_KEYS
)


# dataclasses collect the fields of their bases from the last to the first
@validated_dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class ServerConfig(
    LogKeys,
    PythonKeys,
    BatchKeys,
    ToolKeys,
    PromptKeys,
    LoraKeys,
    EngineKeys,
    DeviceKeys,
    ModelKeys,
    AccessKeys,
    ServingKeys,
):
    """The validated configuration of a server."""

    @field_validator(*TABLE_KEYS, mode="before")
    @classmethod
    def _table(cls, value: Any) -> Any:
        """Parses the YAML of a table that came from a flag or the environment."""
        if not isinstance(value, str):
            return value
        try:
            return yaml.safe_load(value)
        except (yaml.YAMLError, RecursionError) as error:
            raise ValueError(f"not valid YAML{yaml_problem(error)}") from None

    @field_validator("data_parallel_size", mode="before")
    @classmethod
    def _count_of_engines(cls, value: Any) -> Any:
        return 0 if value == "auto" else value

    @field_validator(*PATHS_KEYS, mode="before")
    @classmethod
    def _named_paths(cls, value: Any) -> Any:
        """Reads NAME=PATH, of which a flag gives a list, or the YAML of a table."""
        if isinstance(value, str):
            value = [value] if "=" in value and "{" not in value else cls._table(value)
        if not isinstance(value, list):
            return value
        pairs = [str(entry).partition("=") for entry in value]
        if not all(name and path for name, _, path in pairs):
            raise ValueError("must be NAME=PATH")
        names = [name for name, _, _ in pairs]
        if len(set(names)) < len(names):
            raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is given twice")
        return {name: path for name, _, path in pairs}

    @field_validator("api_key")
    @classmethod
    def _usable_key(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            check_key_text(value.get_secret_value())
        return value

    @field_validator("host")
    @classmethod
    def _without_brackets(cls, value: str) -> str:
        """Accepts an IPv6 address in the brackets of a URL."""
        return value[1:-1] if value.startswith("[") and value.endswith("]") else value

    @field_validator("allowed_hosts")
    @classmethod
    def _host_names(cls, value: list[str] | None) -> list[str] | None:
        for name in value or ():
            if name != "*" and not _HOST_NAME.fullmatch(name):
                raise ValueError(f"{name!r} is not a host name or address: leave out scheme, port and path")
        return value

    @field_validator("mcp_servers")
    @classmethod
    def _mcp_servers(cls, value: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        mcp_entries(value)
        return value

    @field_validator("browser_domains")
    @classmethod
    def _domains(cls, value: list[str]) -> list[str]:
        return check_domains(value)

    @field_validator("private_tool_networks")
    @classmethod
    def _networks(cls, value: list[str]) -> list[str]:
        return check_networks(value)

    @field_validator("current_date")
    @classmethod
    def _iso_date(cls, value: str | None) -> str | None:
        import datetime

        if value is not None:
            datetime.date.fromisoformat(value)
        return value

    @model_validator(mode="after")
    def _no_contradictions(self) -> Self:
        if self.auto_port and self.force_port:
            raise ValueError("auto_port and force_port contradict each other: drop one of them")
        if self.backend == "transformers" and self.load_format == "dummy":
            raise ValueError("backend 'transformers' needs a checkpoint: drop load_format 'dummy'")
        if self.browser_backend == "folder" and self.browser_folder is None:
            raise ValueError("browser_backend 'folder' needs browser_folder: the folder of the documents")
        if self.browser_backend == "searxng" and self.browser_url is None:
            raise ValueError("browser_backend 'searxng' needs browser_url: the URL of the SearXNG server")
        if self.allow_request_mcp_urls and not self.request_mcp_hosts:
            raise ValueError("allow_request_mcp_urls needs request_mcp_hosts: the hosts that the URLs may name")
        self.all_profiles()
        return self

    @property
    def active_profile(self) -> Profile:
        """The selected profile with the operator's changes."""
        return self.all_profiles()[self.profile]

    def all_profiles(self) -> dict[str, Profile]:
        """Returns the profiles with the operator's changes.

        Raises ValueError for an unknown key or a bad value.
        """
        changes: Mapping[str, dict[str, Any]] = {str(k): v for k, v in self.profiles.items()}
        return {name: overridden(PROFILES[name], changes.get(name, {})) for name in PROFILES}

    def resolved(self, key: str) -> Any:
        """Returns a key's value, or the active profile's if the key is one of its and is not set."""
        value = getattr(self, key)
        return getattr(self.active_profile, key) if value is None and key in PROFILE_KEYS else value


KEYS: dict[str, FieldInfo] = vars(ServerConfig)["__pydantic_fields__"]
