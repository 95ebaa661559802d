"""Reads request bodies: a body is either a JSON object or an error that says why it is not."""

from __future__ import annotations

import asyncio
import gc
import json
import math
from collections.abc import Callable
from typing import Any, NoReturn

import msgspec
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request

from gptoss.api.http.errors import BodyTooLarge, BodyTooSlow, InvalidRequest, UnsupportedMediaType
from gptoss.api.http.large_json import CountingDecoder, TooManyValuesError, takes_long
from gptoss.api.http.sender import Sender
from gptoss.api.http.work_pool import WorkPool
from gptoss.config.schema import ServerConfig


async def read_json_object(request: Request, sender: Sender, config: ServerConfig, pool: WorkPool) -> dict[str, Any]:
    """Reads and parses the body; of a large one, in a thread.

    Raises InvalidRequest, BodyTooLarge, BodyTooSlow, UnsupportedMediaType or what WorkPool.run raises.
    """
    max_bytes = config.max_body_bytes
    if config.require_json_content_type:
        check_content_type(request.headers)
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        raise UnsupportedMediaType(f"Content-Encoding {encoding!r} is not supported: send the body uncompressed.")
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > max_bytes:
        raise BodyTooLarge(f"The body has {declared} bytes; at most {max_bytes} are allowed.")
    chunks, size = [], 0
    try:
        async with asyncio.timeout(config.body_timeout_s):
            async for chunk in request.stream():
                size += len(chunk)
                if size > max_bytes:
                    raise BodyTooLarge(f"The body has more than {max_bytes} bytes.")
                chunks.append(chunk)
    except TimeoutError:
        raise BodyTooSlow(f"The body did not arrive within {config.body_timeout_s:g} s.") from None
    except ClientDisconnect:
        raise InvalidRequest("The client disconnected before its body was complete.") from None
    data = b"".join(chunks)
    sender.body_bytes = size
    return await pool.read(sender, lambda stopped: parse_json_object(data, stopped))


def check_content_type(headers: Headers) -> None:
    """Raises UnsupportedMediaType if the Content-Type of a body is not JSON.

    A web site can make a browser send any other type, or none, without a preflight request (CORS).
    """
    if headers.get("content-length", "0").strip() == "0" and "transfer-encoding" not in headers:
        return
    media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        problem = f"not {media_type[:100]!r}" if media_type else "but the request has none"
        raise UnsupportedMediaType(
            f"Content-Type must be application/json, {problem}. Send the header 'Content-Type: application/json' "
            "(with curl: --json instead of -d)."
        )


def parse_json_object(data: bytes, stopped: Callable[[], bool] = lambda: False) -> dict[str, Any]:
    """Parses a body.

    Raises InvalidRequest or BodyTooLarge; EncodingStoppedError once `stopped` returns true.
    """
    if not data.strip():
        raise InvalidRequest("The body is empty; a JSON object is expected.")
    try:
        text = data.decode("utf-8")
        value = _read_long(text, stopped) if takes_long(data) else _loads(text)
        msgspec.json.encode(value)  # fails for lone surrogates, and for nesting that later steps cannot handle
    except UnicodeDecodeError:
        raise InvalidRequest("The body is not valid UTF-8.") from None
    except UnicodeEncodeError:
        raise InvalidRequest("The body contains a lone surrogate, which is not valid Unicode.") from None
    except TooManyValuesError as error:
        raise BodyTooLarge(f"The body contains {error}.") from None
    except RecursionError:
        raise InvalidRequest("The body is nested too deeply.") from None
    except (ValueError, OverflowError, msgspec.MsgspecError) as error:
        raise InvalidRequest(f"We could not parse the JSON body of your request: {error}.") from None
    if not isinstance(value, dict):
        raise InvalidRequest(f"The body must be a JSON object, not {type(value).__name__}.")
    return value


def _read_long(text: str, stopped: Callable[[], bool]) -> Any:
    decoder = CountingDecoder(stopped, parse_constant=_no_constant, parse_float=_finite_float)
    return decoder.decode(text)


def _loads(text: str) -> Any:
    """Parses with the garbage collector paused.

    A parsed JSON tree has no cycles, and collections would walk it repeatedly: two thirds of the time for millions of
    lists.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        return json.loads(text, parse_constant=_no_constant, parse_float=_finite_float)
    finally:
        if collects:
            gc.enable()


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not allowed in JSON")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:32]} is out of range")
    return value
