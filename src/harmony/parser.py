"""Parses generated token ids into reasoning, content and tool calls.

The model's output is Harmony with noise: missing and repeated markers, misspelt channels, misplaced recipients. The
parser decides by recipient first, then by channel; it never raises and never loses text. Every deviation from the
format that it repairs is counted by kind in `recoveries`.
"""

from __future__ import annotations

import codecs
import difflib
import enum
import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

from gptoss.harmony.deltas import SEPARATOR, Delta, Kind
from gptoss.harmony.special_tokens import (
    CALL,
    CHANNEL,
    CONSTRAIN,
    END,
    ENDOFTEXT,
    FIRST_SPECIAL,
    MESSAGE,
    RETURN,
    START,
)
from gptoss.harmony.vocabulary_files import Vocabulary

CHANNELS = ("analysis", "commentary", "final")
MAX_HEADER_BYTES = 256  # after this the message marker is assumed to be missing
_CONTENT_TYPES = frozenset({"json", "code", "text"})
_NOT_A_TOOL = frozenset({"assistant", "user", "all", "system", "developer"})
_RECIPIENT = re.compile(r"\bto=([^\s<]*)")
_ROLES = re.compile(r"^\s*(?:assistant\s*)+")


class _State(enum.Enum):
    HEADER = enum.auto()
    BODY = enum.auto()
    BETWEEN = enum.auto()


@dataclass(slots=True)
class _Header:
    """The text of a header by the marker before it."""

    segments: list[tuple[int, bytearray]] = field(default_factory=lambda: [(START, bytearray())])
    tokens: list[int] = field(default_factory=list)

    @property
    def size(self) -> int:
        return sum(len(text) for _, text in self.segments)

    def is_empty(self) -> bool:
        return self.size == 0 and len(self.segments) == 1


@dataclass(frozen=True, slots=True)
class _Resolved:
    kind: Kind | None  # None: content if this is the last message, else reasoning
    tool_name: str | None
    leftover: str  # text that does not belong in a header
    channel: str = "final"  # of reasoning and content


class ResponseParser:
    """Parses one answer. It begins where the prompt ends, after `<|start|>assistant`."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        tool_names: Collection[str] = (),
        custom_names: Collection[str] = (),
        begun: Collection[Kind] = (),
    ) -> None:
        """`custom_names`: of the tools whose calls are plain text. `begun`: kinds that the answer has text of."""
        self._vocabulary = vocabulary
        self._tools = frozenset(tool_names)
        self._custom = frozenset(custom_names)
        self._state = _State.HEADER
        self._header = _Header()
        self._kind: Kind | None = None
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held: list[int] = []  # tokens whose bytes have not been emitted
        self._undecided: list[tuple[str, tuple[int, ...]]] = []
        self._undecided_tokens = 0
        self._separate: set[Kind] = set(begun)  # kinds that already had a message with text
        self._message_has_text = False
        self._num_calls = 0
        self._arguments_empty = True
        self._position = -1
        self._message_tokens = 0
        self._begun: list[Delta] = []  # of a message that the prompt opened
        self.num_reasoning_tokens = 0
        self.recoveries: Counter[str] = Counter()

    @property
    def kinds_with_text(self) -> frozenset[Kind]:
        """Kinds that had a message with text; another one is separated from it."""
        return frozenset(self._separate)

    def open_final(self) -> None:
        """Begins within the text of a final message, where the prompt ends."""
        self._open_body(_Resolved("content", None, ""), self._begun)

    def await_start(self) -> None:
        """Begins before `<|start|>`, where the prompt ends."""
        self._state = _State.BETWEEN

    def push(self, token_id: int) -> list[Delta]:
        self._position += 1
        self._message_tokens += 1
        out, self._begun = self._begun, []
        if token_id < FIRST_SPECIAL:
            self._text(token_id, out)
        elif token_id == START:
            self._start(out)
        elif token_id == CHANNEL:
            self._channel(out)
        elif token_id == MESSAGE:
            self._message(out)
        elif token_id == CONSTRAIN and self._state is _State.HEADER:
            self._header.segments.append((CONSTRAIN, bytearray()))
        elif token_id in (END, RETURN, CALL, ENDOFTEXT):
            self._end(out)
        else:
            self.recoveries["stray_special_token"] += 1
        return out

    def finish(self, *, truncated: bool = False) -> list[Delta]:
        """Returns the text that was held back.

        `truncated`: by the length limit, so an open call stays as it is.
        """
        out, self._begun = self._begun, []
        if self._state is _State.HEADER:
            self._flush_header(out, discard_bare_call=truncated)
        if self._state is _State.BODY:
            self._close(out, complete=not truncated)
        self._decide("content", out)
        return out

    # --- tokens by kind ---

    def _text(self, token_id: int, out: list[Delta]) -> None:
        data = self._vocabulary.bytes_of(token_id)
        if self._state is _State.BODY:
            self._held.append(self._position)
            self._emit(self._decoder.decode(data), out)
            return
        if self._state is _State.BETWEEN:
            if not data.strip():
                return
            self.recoveries["text_between_messages"] += 1
            self._open_header(out)
        self._header.segments[-1][1].extend(data)
        self._header.tokens.append(self._position)
        if self._header.size > MAX_HEADER_BYTES:
            self._open_without_marker(self._resolve(has_marker=False), out)

    def _start(self, out: list[Delta]) -> None:
        if self._state is _State.BODY:
            self.recoveries["missing_end"] += 1
            self._close(out, complete=True)
        elif self._state is _State.HEADER:
            self.recoveries["repeated_start"] += 1
            if not self._header.is_empty():
                self._flush_header(out)
        self._open_header(out)

    def _channel(self, out: list[Delta]) -> None:
        if self._state is _State.BODY:
            self.recoveries["channel_in_body"] += 1
            self._close(out, complete=True)
            self._open_header(out)
        elif self._state is _State.BETWEEN:
            self.recoveries["missing_start"] += 1
            self._open_header(out)
        self._header.segments.append((CHANNEL, bytearray()))

    def _message(self, out: list[Delta]) -> None:
        if self._state is _State.BODY:
            self.recoveries["message_in_body"] += 1
            return
        if self._state is _State.BETWEEN:
            self.recoveries["missing_start"] += 1
            self._open_header(out)
        resolved = self._resolve(has_marker=True)
        if resolved.leftover:
            self.recoveries["text_in_header"] += 1
            self._aside(resolved.leftover, out)
        self._open_body(resolved, out)

    def _end(self, out: list[Delta]) -> None:
        if self._state is _State.HEADER:
            self._flush_header(out)
        if self._state is _State.BODY:
            self._close(out, complete=True)
        self._state = _State.BETWEEN

    # --- messages ---

    def _open_header(self, out: list[Delta]) -> None:
        self._decide("reasoning", out)
        self._state = _State.HEADER
        self._header = _Header()

    def _open_body(self, resolved: _Resolved, out: list[Delta]) -> None:
        self._state = _State.BODY
        self._kind = resolved.kind
        self._message_has_text = False
        self._held = []
        self._decoder.reset()
        if resolved.kind == "tool_call":
            self._num_calls += 1
            self._arguments_empty = resolved.tool_name not in self._custom
            out.append(Delta("tool_call", "", self._num_calls - 1, resolved.tool_name))
        elif resolved.kind is not None:
            out.append(Delta(resolved.kind, "", channel=resolved.channel))

    def _open_without_marker(self, resolved: _Resolved, out: list[Delta]) -> None:
        """Opens a body that begins with the text that does not belong in the header."""
        self.recoveries["missing_message_marker"] += 1
        tokens = self._header.tokens
        self._open_body(resolved, out)
        self._held = tokens
        self._emit(resolved.leftover, out)

    def _flush_header(self, out: list[Delta], *, discard_bare_call: bool = False) -> None:
        """Ends a header without a message marker: marker words alone are dropped, other text becomes a body."""
        if self._header.is_empty():
            return
        resolved = self._resolve(has_marker=False)
        bare_call = resolved.kind == "tool_call" and not discard_bare_call
        if resolved.leftover.strip() or bare_call:
            self._open_without_marker(resolved, out)

    def _close(self, out: list[Delta], *, complete: bool) -> None:
        self._emit(self._decoder.decode(b"", final=True), out)
        if self._kind == "tool_call" and complete and self._arguments_empty:
            self.recoveries["empty_arguments"] += 1
            out.append(Delta("tool_call", "{}", self._num_calls - 1))
        if self._kind == "reasoning":
            self.num_reasoning_tokens += self._message_tokens
        elif self._kind is None:
            self._undecided_tokens += self._message_tokens
        self._message_tokens = 0
        self._state = _State.BETWEEN

    def _decide(self, kind: Kind, out: list[Delta]) -> None:
        """Emits bodies without a channel: as reasoning once another message follows, as content at the end."""
        pieces, self._undecided = self._undecided, []
        if kind == "reasoning":
            self.num_reasoning_tokens += self._undecided_tokens
        self._undecided_tokens = 0
        if not pieces:
            return
        self._kind, self._message_has_text = kind, False
        out.append(Delta(kind, "", channel="analysis" if kind == "reasoning" else "final"))
        for text, tokens in pieces:
            self._held = list(tokens)
            self._emit(text, out)

    def _aside(self, text: str, out: list[Delta]) -> None:
        """Emits text of a header as reasoning."""
        self._kind, self._message_has_text, self._held = "reasoning", False, []
        out.append(Delta("reasoning", "", channel="analysis"))
        self._emit(text, out)

    def _emit(self, text: str, out: list[Delta]) -> None:
        if not text:
            return
        tokens, self._held = tuple(self._held), []
        kind = self._kind
        if kind is None:
            self._undecided.append((text, tokens))
            return
        if kind == "tool_call":
            self._arguments_empty = self._arguments_empty and not text.strip()
            out.append(Delta(kind, text, self._num_calls - 1, tokens=tokens))
            return
        if not self._message_has_text:
            self._message_has_text = True
            if kind in self._separate:
                out.append(Delta(kind, SEPARATOR, is_separator=True))
            self._separate.add(kind)
        out.append(Delta(kind, text, tokens=tokens))

    # --- headers ---

    def _resolve(self, *, has_marker: bool) -> _Resolved:
        recipients: list[str] = []
        channel: str | None = None
        leftovers: list[str] = []
        num_channels = 0
        for marker, data in self._header.segments:
            text = data.decode("utf-8", "replace")
            recipients += _RECIPIENT.findall(text)
            text = _RECIPIENT.sub("", text)
            if marker == START:
                text = _ROLES.sub("", text)
                if not text.strip():
                    continue
                self.recoveries["text_in_role"] += 1
            num_channels += marker == CHANNEL
            if marker == CONSTRAIN:
                leftovers.append(self._after_content_type(text))
                continue
            found, rest = self._channel_of(text, recipients, has_marker=has_marker, is_role=marker == START)
            channel = found or channel
            leftovers.append(rest)
        if num_channels > 1:
            self.recoveries["repeated_channel"] += 1
        leftover = "".join(leftovers)
        tool, unknown = self._recipient(recipients)
        if tool is not None:
            return _Resolved("tool_call", tool, leftover)
        if unknown:
            self.recoveries["unknown_recipient"] += 1
            if channel == "final":
                return _Resolved("content", None, leftover)
            return _Resolved("reasoning", None, leftover, "analysis")
        if channel is None:
            self.recoveries["no_channel"] += 1
            return _Resolved(None, None, leftover)
        kind: Kind = "reasoning" if channel == "analysis" else "content"
        return _Resolved(kind, None, leftover, channel)

    def _channel_of(
        self, text: str, recipients: list[str], *, has_marker: bool, is_role: bool
    ) -> tuple[str | None, str]:
        """Returns (channel, text that is neither channel, tool name nor content type)."""
        name, _, rest = text.strip().partition(" ")
        if name in CHANNELS:
            is_text = not has_marker and not _is_content_type(rest)
            return name, rest if is_text else self._after_content_type(rest)
        if name.removeprefix("functions.") in self._tools:
            self.recoveries["tool_name_as_channel"] += 1
            recipients.append(name)
            return None, self._after_content_type(rest)
        if is_role and len(name) > 16:
            return None, text
        bare = name.lstrip("–—-_.:;,*#>?!'\"() ")
        repaired = self._misspelt_channel(bare, rest, has_marker=has_marker)
        if repaired is not None:
            self.recoveries["misspelt_channel"] += 1
            return repaired
        if has_marker and not rest and not bare.strip("?!. "):
            return None, ""  # punctuation instead of a channel
        return None, text

    def _misspelt_channel(self, bare: str, rest: str, *, has_marker: bool) -> tuple[str, str] | None:
        """Returns (channel, other text) by the first rule that applies: text after it, text before it, a typo."""
        for known in CHANNELS:
            if bare.startswith(known):
                if has_marker:
                    return known, self._after_content_type(rest)
                return known, bare[len(known) :] + (" " + rest if rest else "")
        for known in CHANNELS:
            if bare.endswith(known):
                return known, bare[: -len(known)] + " " + self._after_content_type(rest)
        nearest = _nearest_channel(bare)
        return None if nearest is None else (nearest, self._after_content_type(rest))

    def _after_content_type(self, text: str) -> str:
        """Drops a content type (`json`, or a channel name in its place) and returns the other text."""
        stripped = text.strip()
        for known in (*_CONTENT_TYPES, *CHANNELS):
            if stripped == known:
                return ""
            if stripped.startswith(known) and not stripped[len(known)].isalnum():
                return stripped[len(known) :]
        return stripped

    def _recipient(self, recipients: list[str]) -> tuple[str | None, bool]:
        """Returns (offered tool, whether a recipient is not an offered tool)."""
        names = [r for r in recipients if r and r not in _NOT_A_TOOL]
        offered = [name for r in names if (name := r.removeprefix("functions.")) in self._tools]
        if len(names) > 1:
            self.recoveries["several_recipients"] += 1
        return (offered[-1], False) if offered else (None, bool(names))


def _nearest_channel(name: str) -> str | None:
    """The channel of a truncated (`comment`) or misspelt (`anaylsis`) name, if there is one."""
    if len(name) < 4:
        return None
    for known in CHANNELS:
        if known.startswith(name):
            return known
    similar = difflib.get_close_matches(name, CHANNELS, n=1, cutoff=0.75)
    return similar[0] if similar and abs(len(similar[0]) - len(name)) <= 2 else None


def _is_content_type(text: str) -> bool:
    return text.strip() in _CONTENT_TYPES
