"""The protocol of tools that the server runs: a ToolRunner, and a ToolSession for each conversation.

The tool loop (tool_loop.py) reads a call from the model, hands it to the runner whose recipient it names, and appends
the result to the prompt. A runner knows neither Harmony nor a wire format nor the server's HTTP.

What the loop guarantees to a runner:

- `open` is awaited before the first call of a session, `ToolSession.close` exactly once after the last one.
- Calls of one session come one after another, unless the runner sets `parallel`.
- A call that is still running at its deadline, or whose client is gone, is cancelled: `call` gets
  asyncio.CancelledError at its await. It then stops what it started (processes, connections) before it lets the error
  pass. The loop waits for that at most STOP_S seconds.
- The text of a result is data: it is encoded without special tokens, and cut at `ToolCall.max_bytes`.

What a runner guarantees to the loop:

- `call` never raises for what the tool, the model or the network does wrong: that is a ToolResult with a `failure`. Its
  text still lets the model read what happened. Any other exception is a bug: it is logged, and the model reads only
  "the tool failed".
- It neither blocks the event loop nor holds more than a few times `max_bytes` of output in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from gptoss.harmony.conversation import ToolNamespace

STOP_S = 5.0  # for a cancelled call to stop what it started

# protocol: the tool's server broke its protocol; execution: the tool reports an error; http: an HTTP status;
# timeout: the deadline; limit: memory, output, sessions or calls; unavailable: nothing answers;
# gone: the session that the call refers to has been evicted; invalid: the model's call cannot be read; internal: a bug
FailureKind = Literal["protocol", "execution", "http", "timeout", "limit", "unavailable", "gone", "invalid", "internal"]


@dataclass(frozen=True, slots=True)
class TextPart:
    text: str


@dataclass(frozen=True, slots=True)
class ImagePart:
    """An image for the client; the model reads only that there is one."""

    data: bytes
    media_type: str  # image/png


ResultPart = TextPart | ImagePart


@dataclass(frozen=True, slots=True)
class ToolFailure:
    kind: FailureKind
    message: str  # for the client; one line
    code: int | None = None  # an HTTP status, a JSON-RPC error code


@dataclass(frozen=True, slots=True)
class ToolResult:
    """What a call came to.

    `extras` are what the API shows besides, in JSON: see the runner. The browser gives `action` (the action of a
    web_search_call), `sources` (URLs), `results` ([{"url", "title"}]) and `title` (of the page), Python `outputs`
    ([{"type": "logs", "logs": ...}, {"type": "image", "url": ...}]).
    """

    content: tuple[ResultPart, ...] = ()
    failure: ToolFailure | None = None
    extras: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return self.failure is None

    @classmethod
    def of_text(cls, text: str, **extras: Any) -> ToolResult:
        return cls((TextPart(text),), None, extras)

    @classmethod
    def failed(cls, kind: FailureKind, message: str, *, text: str | None = None, code: int | None = None) -> ToolResult:
        """A failure. `text`: what the model reads; None: the message."""
        return cls((TextPart(message if text is None else text),), ToolFailure(kind, message, code))


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """One call by the model."""

    recipient: str  # one of the runner's, as the model wrote it: "browser.search", "python"
    text: str  # JSON arguments, or the plain text of a tool without functions; not validated
    call_id: str
    deadline: float  # time.monotonic() at which the call is cancelled
    max_bytes: int  # of the result's texts together, as UTF-8
    options: Mapping[str, Any] = field(default_factory=dict)  # of this request: see SessionOptions.options

    @property
    def function(self) -> str:
        """`search` of `browser.search`; the recipient itself where it has no function."""
        return self.recipient.rpartition(".")[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionOptions:
    """Who opens a session, and what the request's tool entry asks for.

    `options` are the validated fields of that entry, without `type`: for the browser `allowed_domains` (a tuple),
    `blocked_domains` (likewise), `search_context_size`, `user_location`; for Python `memory_bytes`.
    """

    tenant: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class McpTool:
    """A tool as its MCP server describes it."""

    name: str
    description: str | None
    input_schema: dict[str, Any]
    annotations: dict[str, Any] | None = None

    @property
    def is_read_only(self) -> bool:
        return bool((self.annotations or {}).get("readOnlyHint"))


@dataclass(frozen=True, slots=True)
class Citation:
    """A source of a part of the answer, in characters of the text that the client reads."""

    start: int
    end: int
    url: str
    title: str
    text: str = ""  # what is cited
    mark: str = ""  # as the model wrote it
    num_blanks: int = 0  # before the citation, which the model did not write


class AnswerFilter(Protocol):
    """Rewrites one text of the final answer as it is generated: citation marks become links."""

    def feed(self, text: str) -> tuple[str, list[Citation]]:
        """The text that may be shown now, and the citations that it completes. Holds back a mark that is cut."""

    def flush(self) -> tuple[str, list[Citation]]:
        """What was held back, when the text has ended."""


class ToolSession(Protocol):
    """The state of one tool in one response chain: open pages, a Python process.

    It is kept for requests that continue the response (`previous_response_id`) until it has been idle too long, or has
    to make way for another one.
    """

    @property
    def id(self) -> str:
        """Unguessable, and unique in this server; `cntr_...` for Python."""

    @property
    def is_alive(self) -> bool:
        """False once it can serve no more calls: its process has died."""

    def answer_filter(self) -> AnswerFilter | None:
        """For each text of the final answer a new one; None: the text stays as it is."""

    async def close(self) -> None:
        """Ends what the session holds: processes, files, connections. Never raises.

        A call may be running or being cancelled meanwhile.
        """


class ToolRunner(Protocol):
    """A tool that the server runs."""

    @property
    def name(self) -> str:
        """Names it in metrics, logs and limits: `browser`, `python`, or `mcp:<label>`."""

    @property
    def namespace(self) -> ToolNamespace | None:
        """What the system message shows. None: it is offered as functions, which the request lists (MCP)."""

    @property
    def parallel(self) -> bool:
        """Whether calls of one session may run at the same time."""

    async def open(self, options: SessionOptions) -> ToolSession:
        """Opens a session. Raises ToolUnavailableError: the call that needs it then fails."""

    async def call(self, call: ToolCall, session: ToolSession) -> ToolResult:
        """Runs one call: see the head of this module."""

    async def close(self) -> None:
        """Ends what the runner holds for all sessions, at shutdown; they have been closed already."""


class ToolUnavailableError(Exception):
    """A session cannot be opened."""

    def __init__(self, message: str, kind: FailureKind = "unavailable") -> None:
        super().__init__(message)
        self.message, self.kind = message, kind
