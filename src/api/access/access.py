"""Who may send requests, and how many: keys, limits for each, and the state of draining."""

from __future__ import annotations

import hmac
import logging
import secrets
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from gptoss.api.access.api_keys import Caller, anonymous, digest_of, load_callers
from gptoss.api.access.hosts import HostCheck
from gptoss.api.access.usage import Allowance, Usage
from gptoss.api.http.errors import Forbidden, Unauthorized, Unavailable
from gptoss.api.http.paths import ALWAYS_OPEN, DEBUG, PAGE
from gptoss.config.errors import ConfigError
from gptoss.config.schema import ServerConfig

logger = logging.getLogger(__name__)


class Access:
    """Keys and limits of one app. `draining` closes the door for new work."""

    def __init__(self, config: ServerConfig, callers: list[Caller] | None = None) -> None:
        """Reads the keys where they are not given. Raises ConfigError."""
        self._config = config
        self.usage = Usage()
        self._callers = load_callers(config) if callers is None else callers
        self._anonymous = anonymous(config)
        self._cache_secret = secrets.token_bytes(32)
        self._hosts = HostCheck(config)
        self.draining = False
        self.max_header_bytes = config.max_header_bytes
        self.refused: Counter[str] = Counter()  # by reason

    def reload(self) -> bool:
        """Reads the keys again; keeps the old ones if the file is wrong. -> whether it was right."""
        file = self._config.api_keys_file
        if file is not None and file.exists() and not file.is_file():
            logger.error("keys not reloaded: api_keys_file %s is a pipe, which is read once", file)
            return False
        try:
            self._callers = load_callers(self._config)
        except ConfigError as error:
            logger.error("keys not reloaded: %s", error)
            return False
        logger.info("keys reloaded: %d", len(self._callers))
        return True

    def check_host(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Raises Forbidden."""
        for name, value in headers:
            if name == b"host" and not self._hosts.allows(value):
                shown = value[:100].decode("latin-1")
                raise Forbidden(
                    f"Host {shown!r} is not allowed: use localhost, or add the name to allowed_hosts.",
                    code="host_not_allowed",
                )

    def identify(self, headers: Mapping[bytes, bytes], path: str) -> Caller:
        """Raises Unauthorized or Forbidden."""
        caller = self._anonymous
        if self._callers and not self._is_open(path):
            caller = self._owner_of_key(headers)
        if path in DEBUG and not self._config.debug_endpoints:
            raise Forbidden("This endpoint is off; debug_endpoints switches it on.", code="debug_endpoint")
        return caller

    def _owner_of_key(self, headers: Mapping[bytes, bytes]) -> Caller:
        scheme, _, key = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
        if scheme.lower() != "bearer":
            key = headers.get(b"x-api-key", headers.get(b"api-key", b"")).decode("latin-1")
        key = key.strip()
        if not key:
            raise Unauthorized("You didn't provide an API key. Send it as 'Authorization: Bearer KEY'.", None, None)
        digest, found = digest_of(key), None
        for caller in self._callers:  # all of them, so that the time tells nothing
            if hmac.compare_digest(caller.digest, digest):
                found = caller
        if found is None:
            raise Unauthorized("Incorrect API key provided.", None, "invalid_api_key")
        return found

    def _is_open(self, path: str) -> bool:
        if path in ALWAYS_OPEN:
            return True
        if path == "/" or path.startswith(PAGE):
            return self._config.public_page
        return path == "/metrics" and self._config.public_metrics

    def cache_scope(self, caller: Caller | None) -> str:
        """Requests share cached prefixes where their scopes are equal: one scope for each key, which no client can
        name and which a new key of the same name does not inherit, unless shared_prefix_cache is set."""
        if caller is None or not caller.digest or self._config.shared_prefix_cache:
            return ""
        identity = caller.digest + caller.name.encode()
        return hmac.digest(self._cache_secret, identity, "sha256")[:16].hex()

    def enter(self, caller: Caller, *, generates: bool) -> Allowance:
        """Takes one request from the caller's limits. Raises RateLimited, or Unavailable while draining."""
        if self.draining:
            raise Unavailable("The server is shutting down.", code="draining", headers={"retry-after": "5"})
        return self.usage.enter(caller, generates=generates)

    def report(self) -> dict[str, Any]:
        """For /stats: counts, no names of keys."""
        return {"keys": len(self._callers), "refused": dict(self.refused), "draining": self.draining}
