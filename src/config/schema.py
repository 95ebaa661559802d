"""Every key of the server's configuration, with its type, default and description."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from gptoss.config.profiles import PROFILES, Profile, ProfileName, overridden
from gptoss.config.text import (
    check_key_text,
    yaml_problem,
)

ENV_PREFIX = "GPTOSS_"
# Keys whose default is the profile's value.
PROFILE_KEYS = ("max_num_seqs", "max_num_batched_tokens", "max_num_waiting", "batch_invariant")
_HOST_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*)|[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*")


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
        description="end a message, string or array that repeats itself this often; 0: off; unset: the model's",
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
