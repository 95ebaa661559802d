"""API keys: the callers they identify, and the limits of each.

Keys are stored as SHA-256 digests. A key is 256 random bits, so a slow hash would only slow down every request.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from gptoss.api.http.errors import Unauthorized
from gptoss.api.http.sender import ANONYMOUS
from gptoss.config.errors import ConfigError
from gptoss.config.schema import ServerConfig
from gptoss.config.text import check_key_text, read_yaml

logger = logging.getLogger(__name__)


class KeyEntry(BaseModel):
    """One entry of the keys file. A limit of 0 means unlimited."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1, max_length=64)
    key: str | None = Field(None, min_length=8)
    sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")
    requests_per_minute: int | None = Field(None, ge=0)
    tokens_per_minute: int | None = Field(None, ge=0)
    max_concurrent_requests: int | None = Field(None, ge=0)
    tool_calls_per_minute: int | None = Field(None, ge=0)

    @field_validator("name")
    @classmethod
    def _own_name(cls, value: str) -> str:
        if value == ANONYMOUS:
            raise ValueError(f"{ANONYMOUS!r} is reserved for requests without a key: use another name")
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
    """The sender of a request, identified by its key. A limit of 0 means unlimited."""

    name: str
    digest: bytes
    requests_per_minute: int
    tokens_per_minute: int
    max_concurrent_requests: int
    tool_calls_per_minute: int = 0


def load_callers(config: ServerConfig) -> list[Caller]:
    """Returns the callers that have a key.

    The list is empty only if no key is configured, which leaves the server open.

    Raises:
        ConfigError: the keys file is missing, invalid or has no key. The message contains no key.
    """
    default = anonymous(config)
    callers = []
    if config.api_key is not None:
        callers.append(replace(default, name="default", digest=digest_of(config.api_key.get_secret_value())))
    if config.api_keys_file is not None:
        callers += [_caller(entry, default) for entry in _read_entries(config.api_keys_file)]
        if not callers:
            raise ConfigError(
                f"api_keys_file {config.api_keys_file} holds no key: add one, or unset api_keys_file to serve requests "
                "without a key"
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
    return Caller(
        ANONYMOUS,
        b"",
        config.requests_per_minute,
        config.tokens_per_minute,
        config.max_concurrent_requests,
        config.tool_calls_per_minute,
    )


def _read_entries(path: Path) -> list[KeyEntry]:
    raw = read_yaml(path, f"api_keys_file {path}")
    if raw is None:
        raise ConfigError(
            f"api_keys_file {path} is empty: add a key, or unset api_keys_file to serve requests without a key"
        )
    if not isinstance(raw, list):
        raise ConfigError(f"api_keys_file {path} must be a list of entries with name and key or sha256")
    return [_entry(path, number, item) for number, item in enumerate(raw)]


def _entry(path: Path, number: int, item: object) -> KeyEntry:
    try:
        return KeyEntry.model_validate(item)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        if first["type"] == "extra_forbidden":  # the name of the field may be a misplaced key
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
        limit(entry.tool_calls_per_minute, default.tool_calls_per_minute),
    )


def digest_of(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def tenant_of(caller: Caller | None) -> str:
    """The name under which the engine schedules a caller's requests."""
    return ANONYMOUS if caller is None else caller.name


class ApiKeys:
    """The keys of one app."""

    def __init__(self, config: ServerConfig, callers: list[Caller] | None = None) -> None:
        """`callers`: the keys, if they have been read already. Raises ConfigError."""
        self._config = config
        self._callers = load_callers(config) if callers is None else callers
        self._cache_secret = secrets.token_bytes(32)
        self.anonymous = anonymous(config)

    def __len__(self) -> int:
        return len(self._callers)

    def reload(self) -> bool:
        """Reads the keys again; returns False, and keeps the old ones, if the file is invalid."""
        file = self._config.api_keys_file
        if file is not None and file.exists() and not file.is_file():
            logger.error("keys not reloaded: api_keys_file %s is a pipe, which can be read only once", file)
            return False
        try:
            self._callers = load_callers(self._config)
        except ConfigError as error:
            logger.error("keys not reloaded: %s", error)
            return False
        logger.info("keys reloaded: %d", len(self._callers))
        return True

    def identify(self, headers: Mapping[bytes, bytes]) -> Caller:
        """The owner of the key in `headers`; anonymous if no keys are configured. Raises Unauthorized."""
        if not self._callers:
            return self.anonymous
        scheme, _, key = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
        if scheme.lower() != "bearer":
            key = headers.get(b"x-api-key", headers.get(b"api-key", b"")).decode("latin-1")
        key = key.strip()
        if not key:
            raise Unauthorized("You didn't provide an API key. Send it as 'Authorization: Bearer KEY'.", None, None)
        digest, found = digest_of(key), None
        for caller in self._callers:  # always all of them, so that the time reveals nothing
            if hmac.compare_digest(caller.digest, digest):
                found = caller
        if found is None:
            raise Unauthorized("Incorrect API key provided.", None, "invalid_api_key")
        return found

    def named(self, name: str) -> Caller | None:
        """The caller with this name; None if its key has been removed."""
        known = self._callers or [self.anonymous]
        return next((caller for caller in known if caller.name == name), None)

    def cache_scope(self, caller: Caller | None) -> str:
        """The scope of a caller's cached prefixes; requests share prefixes only within one scope.

        Each key has its own, which clients cannot guess and a new key of the same name does not inherit, unless
        shared_prefix_cache is set.
        """
        if caller is None or not caller.digest or self._config.shared_prefix_cache:
            return ""
        identity = caller.digest + caller.name.encode()
        return hmac.digest(self._cache_secret, identity, "sha256")[:16].hex()
