"""A conversation with its settings: what is sent each turn, and the file that /save and /load use."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gptoss.cli.remote.answer import WITH_USAGE
from gptoss.cli.remote.connection import reason
from gptoss.cli.remote.errors import UsageError

FORMAT = 1
SENT = ("role", "content")  # of a message; reasoning is kept in the file only


@dataclass(slots=True)
class Conversation:
    """`messages` alternate between user and assistant; an assistant's may have `reasoning`."""

    model: str
    system: str | None = None
    effort: str | None = None
    profile: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    seed: int | None = None
    messages: list[dict[str, str]] = field(default_factory=list)

    def body(self) -> dict[str, Any]:
        """Returns the chat request for the next answer."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        fields = {
            "model": self.model,
            "messages": [*system, *({name: m[name] for name in SENT} for m in self.messages)],
            "reasoning_effort": self.effort,
            "profile": self.profile,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
        }
        return {name: value for name, value in fields.items() if value is not None} | WITH_USAGE

    def add_user(self, text: str) -> None:
        self.messages.append({"role": "user", "content": text})

    def add_answer(self, text: str, reasoning: str) -> None:
        """Adds what was answered; without any text the question is taken back, so that it can be asked again."""
        if text:
            self.messages.append({"role": "assistant", "content": text, "reasoning": reasoning})
        else:
            self.messages.pop()

    def take_back(self) -> str | None:
        """Removes the last question with its answer and returns it."""
        while self.messages:
            last = self.messages.pop()
            if last["role"] == "user":
                return last["content"]
        return None


def save(conversation: Conversation, path: Path) -> None:
    """Writes the file. Raises UsageError, also if the file exists and is not a conversation."""
    if path.exists():
        load(path)
    text = json.dumps({"format": FORMAT, **asdict(conversation)}, indent=2)
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {path}: {reason(error)}") from None


def load(path: Path) -> Conversation:
    """Returns the conversation in the file. Raises UsageError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {reason(error)}") from None
    except ValueError:
        found = None
    if not _is_conversation(found):
        raise UsageError(f"{path} is not a saved conversation")
    return Conversation(**{name: found[name] for name in Conversation.__dataclass_fields__ if name in found})


def _is_conversation(found: Any) -> bool:
    return (
        isinstance(found, dict)
        and found.get("format") == FORMAT
        and isinstance(found.get("model"), str)
        and isinstance(found.get("messages"), list)
        and all(isinstance(m, dict) and all(isinstance(m.get(name), str) for name in SENT) for m in found["messages"])
    )
