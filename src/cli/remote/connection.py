"""Requests to an OpenAI-compatible server, by the standard library alone.

Every failure is a CommandError whose message is one line. Proxies of the environment are used, except for this
machine's own addresses; redirects are not followed, as they would hand the API key to another host.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Generator, Iterator
from typing import Any
from urllib.parse import urlsplit

from gptoss import __version__
from gptoss.cli.remote.errors import Refused, Unreachable, UsageError

DEFAULT_URL = "http://127.0.0.1:8000"
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1", "0.0.0.0", "::")
MAX_ERROR_CHARS = 500


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


class Connection:
    """One server: its base URL, the key and the time to wait for an answer or for the next part of one."""

    def __init__(self, url: str, api_key: str | None = None, timeout_s: float = 600.0) -> None:
        """Raises UsageError if the URL or the key cannot be used."""
        self.url = base_url(url)
        self.timeout_s = timeout_s
        self._headers = {"User-Agent": f"gptoss/{__version__}", **authorization(api_key)}
        proxies: list[urllib.request.BaseHandler] = []
        if urlsplit(self.url).hostname in LOCAL_HOSTS:
            proxies = [urllib.request.ProxyHandler({})]
        self._opener = urllib.request.build_opener(_NoRedirects, *proxies)

    def get(self, path: str, *, accept: tuple[int, ...] = ()) -> dict[str, Any]:
        """Returns the JSON object of an answer with status 200, or with one of `accept`. Raises CommandError."""
        return self._json("GET", path, None, accept)

    def post(self, path: str, body: Any) -> dict[str, Any]:
        """Returns the JSON object of the answer. Raises CommandError."""
        return self._json("POST", path, body, ())

    def stream(self, path: str, body: dict[str, Any]) -> Generator[dict[str, Any], None, None]:
        """Yields the events of a streamed answer. Raises CommandError.

        Closing the iterator ends the generation.
        """
        with self._open("POST", path, body | {"stream": True}, ()) as response, self._plain_errors():
            for line in response:
                if not line.startswith(b"data:"):
                    continue
                data = line[5:].strip()
                if data == b"[DONE]":
                    return
                event = json.loads(data)
                if not isinstance(event, dict):
                    raise ValueError
                if event.get("error"):
                    raise Refused(f"the server ended the answer: {_message_of(event)}")
                yield event
        raise Unreachable(f"{self.url} closed the connection in the middle of an answer")

    def first_model(self) -> str:
        """Returns the name of the first model that the server lists. Raises CommandError."""
        listed = self.get("/v1/models")
        try:
            return str(listed["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            raise Refused(f"{self.url}/v1/models lists no model: name one with --model") from None

    def _json(self, method: str, path: str, body: Any, accept: tuple[int, ...]) -> dict[str, Any]:
        with self._open(method, path, body, accept) as response, self._plain_errors():
            found = json.loads(response.read())
            if not isinstance(found, dict):
                raise ValueError
            return found

    def _open(self, method: str, path: str, body: Any, accept: tuple[int, ...]) -> http.client.HTTPResponse:
        data = None if body is None else json.dumps(body).encode()
        headers = self._headers | ({} if data is None else {"Content-Type": "application/json"})
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        with self._plain_errors():
            try:
                response: http.client.HTTPResponse = self._opener.open(request, timeout=self.timeout_s)
            except urllib.error.HTTPError as error:
                if error.code in accept:
                    return error  # type: ignore[return-value]  # it reads like a response
                with error:
                    raise refusal(self.url + path, error.code, error.headers.get("retry-after"), error.read()) from None
        return response

    @contextlib.contextmanager
    def _plain_errors(self) -> Iterator[None]:
        try:
            yield
        except urllib.error.URLError as error:
            raise Unreachable(f"cannot reach {self.url}: {reason(error.reason)}") from None
        except TimeoutError:
            raise Unreachable(f"no answer from {self.url} within {self.timeout_s:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            raise Unreachable(f"the connection to {self.url} broke: {reason(error)}") from None
        except ValueError:
            raise Refused(f"{self.url} does not answer as an OpenAI-compatible server does") from None


def base_url(text: str) -> str:
    """Returns scheme, host, port and prefix, without `/v1`.

    `host:8000` and `http://host:8000/v1/` name the same server.

    Raises:
        UsageError: it is not the URL of a server.
    """
    url = text.strip() if "://" in text else f"http://{text.strip()}"
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
        valid = valid and not any(c.isspace() or ord(c) < 32 for c in url) and url.isascii()
    except ValueError:
        valid = False
    if not valid or parts.query or parts.fragment or parts.username:
        raise UsageError(f"{text!r} is not the URL of a server, such as {DEFAULT_URL}")
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def authorization(api_key: str | None) -> dict[str, str]:
    """Returns the header that sends the key. Raises UsageError if a header cannot hold it."""
    if not api_key:
        return {}
    if not (api_key.isascii() and api_key.isprintable()):
        raise UsageError("the API key has characters that an HTTP header cannot hold")
    return {"Authorization": f"Bearer {api_key}"}


def refusal(url: str, status: int, retry_after: str | None, body: bytes) -> Refused:
    """Returns the error of an answer with this status, and what to do about it."""
    try:
        message = _message_of(json.loads(body))
    except ValueError:
        message = body.decode("utf-8", "replace")
    text = " ".join(message.split())[:MAX_ERROR_CHARS] or http.client.responses.get(status, "no reason given")
    if status == 401:
        text += " (set --api-key, GPTOSS_API_KEY or OPENAI_API_KEY)"
    elif status in (429, 503) and retry_after:
        text += f" (retry after {retry_after} s)"
    return Refused(f"{status} from {url}: {text}", status)


def _message_of(body: Any) -> str:
    error = body.get("error", body) if isinstance(body, dict) else body
    message = error.get("message") or error.get("detail") if isinstance(error, dict) else error
    return message if isinstance(message, str) else json.dumps(error)


def reason(error: Any) -> str:
    """Returns why, in one line and without Python's names."""
    return str(getattr(error, "strerror", None) or error or type(error).__name__).splitlines()[0].strip()
