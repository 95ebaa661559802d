"""Who sends a request."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass

from starlette.requests import Request
from starlette.types import Receive

ANONYMOUS = "anonymous"  # the name of callers without a key
MAX_CLIENT = 64
_PRODUCT = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # a token of RFC 9110, 5.6.2


@dataclass(slots=True)
class Sender:
    """The sender of a request, the size of its body, and the channel that reports a disconnect."""

    owner: str  # of work on the body; senders without a key differ by their address
    body_bytes: int = 0  # once the body has been read
    receive: Receive | None = None
    client: str = "unknown"  # see client_of
    tenant: str = ANONYMOUS  # shares the engine equally with other tenants
    cache_scope: str = ""  # of its prompts and prefixes

    async def gone(self) -> None:
        """Returns when the client has disconnected. Await it only after the body has been read."""
        if self.receive is None:
            await asyncio.Future()
        else:
            while (await self.receive())["type"] != "http.disconnect":
                pass


def client_of(request: Request) -> str:
    """The name of the client's key, else the product of its User-Agent."""
    caller = getattr(request.state, "caller", None)
    if caller is not None and caller.name != ANONYMOUS:
        return str(caller.name)
    product = _PRODUCT.match(request.headers.get("user-agent", "").strip())
    return product[0][:MAX_CLIENT] if product is not None else "unknown"
