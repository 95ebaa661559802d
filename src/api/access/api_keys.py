"""API keys: who the callers are, and the limits of each.

Keys are kept as SHA-256 digests. A key is 256 random bits, so a slow hash would only slow every request down.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from gptoss.config.errors import ConfigError
from gptoss.config.schema import ServerConfig
from gptoss.config.text import check_key_text, read_yaml

ANONYMOUS = "anonymous"


class KeyEntry(BaseModel):
    """One line of the keys file. 0 is no limit."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1, max_length=64)
    key: str | None = Field(None, min_length=8)
    sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")
    requests_per_minute: int | None = Field(None, ge=0)
    tokens_per_minute: int | None = Field(None, ge=0)
    max_concurrent_requests: int | None = Field(None, ge=0)

    @field_validator("name")
    @classmethod
    def _own_name(cls, value: str) -> str:
        if value == ANONYMOUS:
            raise ValueError(f"{ANONYMOUS!r} stands for requests without a key: take another name")
        return value

    @field_validator("key")
    @classmethod
    def _usable_key(cls, value: str | None) -> str | None:
        return None if value is None else check_key_text(value)

    @field_validator("sha256")
    @classmethod
    def _of_a_key(cls, value: str | None) -> str | None:
        if value == digest_of("").hex():
            raise ValueError("is the digest of an empty key")
        return value

    @model_validator(mode="after")
    def _one_secret(self) -> KeyEntry:
        if (self.key is None) == (self.sha256 is None):
            raise ValueError("exactly one of key and sha256 is needed")
        return self


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks. Limits of 0 do not exist."""

    name: str
    digest: bytes
    requests_per_minute: int
    tokens_per_minute: int
    max_concurrent_requests: int


def load_callers(config: ServerConfig) -> list[Caller]:
    """Returns the callers that have a key; an empty list only if no key is configured: the server is then open.

    Raises:
        ConfigError: the keys file is missing, wrong or without any key; no key is in the message.
    """
    default = anonymous(config)
    callers = []
    if config.api_key is not None:
        callers.append(replace(default, name="default", digest=digest_of(config.api_key.get_secret_value())))
    if config.api_keys_file is not None:
        callers += [_caller(entry, default) for entry in _read_entries(config.api_keys_file)]
        if not callers:
            raise ConfigError(
                f"api_keys_file {config.api_keys_file} holds no key: add one, or unset api_keys_file to serve everybody"
            )
    _check_distinct(callers)
    return callers


def _check_distinct(callers: Sequence[Caller]) -> None:
    by_name: set[str] = set()
    by_digest: dict[bytes, str] = {}
    for caller in callers:
        if caller.name in by_name:
            raise ConfigError(f"api_keys_file: two keys have the name {caller.name!r}")
        if caller.digest in by_digest:
            other = by_digest[caller.digest]
            raise ConfigError(f"api_keys_file: {other!r} and {caller.name!r} have the same key")
        by_name.add(caller.name)
        by_digest[caller.digest] = caller.name


def anonymous(config: ServerConfig) -> Caller:
    return Caller(ANONYMOUS, b"", config.requests_per_minute, config.tokens_per_minute, config.max_concurrent_requests)


def _read_entries(path: Path) -> list[KeyEntry]:
    raw = read_yaml(path, f"api_keys_file {path}")
    if raw is None:
        raise ConfigError(f"api_keys_file {path} is empty: add a key, or unset api_keys_file to serve everybody")
    if not isinstance(raw, list):
        raise ConfigError(f"api_keys_file {path} must be a list of entries with name and key or sha256")
    return [_entry(path, number, item) for number, item in enumerate(raw)]


def _entry(path: Path, number: int, item: object) -> KeyEntry:
    try:
        return KeyEntry.model_validate(item)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        if first["type"] == "extra_forbidden":  # its name may be a key that was written in the wrong place
            problem = f"unknown field; known fields: {', '.join(KeyEntry.model_fields)}"
        else:
            message = first["msg"].removeprefix("Value error, ")
            if first["loc"] == ("key",) and first["type"] == "string_type":
                message += ": put the key in quotes"
            problem = f"{'.'.join(map(str, first['loc'])) or 'entry'}: {message}"
        raise ConfigError(f"api_keys_file {path}, entry {number}: {problem}") from None


def _caller(entry: KeyEntry, default: Caller) -> Caller:
    digest = bytes.fromhex(entry.sha256) if entry.sha256 is not None else digest_of(entry.key or "")

    def limit(own: int | None, common: int) -> int:
        return common if own is None else own

    return Caller(
        entry.name,
        digest,
        limit(entry.requests_per_minute, default.requests_per_minute),
        limit(entry.tokens_per_minute, default.tokens_per_minute),
        limit(entry.max_concurrent_requests, default.max_concurrent_requests),
    )


def digest_of(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def tenant_of(caller: Caller | None) -> str:
    """Whose share of the engine a request takes."""
    return ANONYMOUS if caller is None else caller.name
