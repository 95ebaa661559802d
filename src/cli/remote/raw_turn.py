"""A turn as Harmony: the prompt's text, then each generated token, special tokens included.

/v1/completions shows special tokens only among its logprobs, so the text is put together from these.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Generator
from typing import Any

from gptoss.cli.remote.answer import COMPLETIONS, Answer
from gptoss.cli.remote.connection import Connection
from gptoss.cli.remote.errors import Refused

MAX_TOKENS = 4096  # unless the conversation says otherwise
PASSED_ON = ("model", "temperature", "seed")
MESSAGE = re.compile(r"<\|channel\|>(\w+)[^<]*<\|message\|>(.*?)(?=<\|(?:end|return|call|start)\|>|\Z)", re.DOTALL)


class RawTurn:
    """One turn; `answer` is complete once `pieces` has ended."""

    def __init__(self, connection: Connection, chat: dict[str, Any], shown_ids: list[int]) -> None:
        """Requests the prompt's tokens from the server. Raises CommandError.

        `shown_ids`: ids of the last turn's prompt; only what follows their common beginning is shown.
        """
        self._connection = connection
        body = {name: value for name, value in chat.items() if name != "stream_options"}
        found = connection.post("/tokenize", body)
        try:
            self.prompt_ids: list[int] = list(found["tokens"])
            left = int(found["max_model_len"]) - len(self.prompt_ids)
        except (KeyError, TypeError, ValueError):
            raise Refused(f"{connection.url} does not show its prompts: raw mode needs a gpt-oss server") from None
        self._request = {name: chat[name] for name in PASSED_ON if name in chat} | {
            "prompt": self.prompt_ids,
            "max_tokens": max(1, min(chat.get("max_tokens", MAX_TOKENS), left)),
            "logprobs": 0,
        }
        self._shown = shown_ids
        self.answer = Answer()

    def prompt_text(self) -> str:
        """Returns the part of the prompt that the last turn did not show. Raises CommandError."""
        common = 0
        for one, other in zip(self._shown, self.prompt_ids, strict=False):
            if one != other:
                break
            common += 1
        return str(self._connection.post("/detokenize", {"tokens": self.prompt_ids[common:]}).get("prompt", ""))

    def pieces(self) -> Generator[str, None, None]:
        """Yields the text of the tokens as they come. Raises CommandError."""
        decoder, text = codecs.getincrementaldecoder("utf-8")("replace"), ""
        try:
            for event in self._connection.stream(COMPLETIONS, self._request):
                for choice in event.get("choices") or ():
                    tokens = (choice.get("logprobs") or {}).get("tokens") or ()
                    piece = decoder.decode(b"".join(map(token_bytes, tokens)))
                    self.answer.finish_reason = choice.get("finish_reason")
                    text += piece
                    yield piece
        finally:
            messages = MESSAGE.findall(text)
            self.answer.reasoning = "".join(part for channel, part in messages if channel == "analysis")
            self.answer.text = "".join(part for channel, part in messages if channel != "analysis")


def token_bytes(token: str) -> bytes:
    r"""Returns the bytes of a token from its name in logprobs.

    The name is its text, or `bytes:\xe2\x82` for a part of a character.
    """
    escaped = token.removeprefix("bytes:")
    if escaped != token and re.fullmatch(r"(\\x[0-9a-f]{2})+", escaped):
        return bytes.fromhex(escaped.replace("\\x", ""))
    return token.encode()
