"""The prompt of the next round: the one before, what was generated, and the results, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gptoss.harmony.render import builtin_result, generation_prefix, render_message, tool_result
from gptoss.harmony.special_tokens import CALL, END, ENDOFTEXT, MESSAGE, RETURN
from gptoss.harmony.vocabulary_files import Vocabulary

CUT = "\n[the rest is left out: the context is full]"
MIN_ANSWER_TOKENS = 128  # that results leave room for


@dataclass(frozen=True, slots=True)
class Answered:
    """The result of a call as the model reads it.

    `recipient`: a function's name, or a built-in tool's recipient.
    """

    recipient: str
    is_builtin: bool
    text: str


def next_prompt(
    prompt: Sequence[int],
    generated: Sequence[int],
    results: Sequence[Answered],
    vocabulary: Vocabulary,
    max_model_len: int,
) -> list[int]:
    """The ids of the next round's prompt. Results are cut where they leave no room for an answer.

    The text of a result never becomes a special token.
    """
    opening = generation_prefix(vocabulary)
    ids = [*prompt, *ended(generated)]
    left = max_model_len - len(ids) - len(opening) - MIN_ANSWER_TOKENS
    for index, result in enumerate(results):
        rendered = _render(result, vocabulary)
        room = left // (len(results) - index)  # those that are left share it equally
        if len(rendered) > room:
            rendered = _cut(rendered, max(room, 0), vocabulary)
        left -= len(rendered)
        ids += rendered
    return ids + opening


def ended(generated: Sequence[int]) -> list[int]:
    """What was generated, as history: it ends with a call."""
    ids = [*generated]
    if ids and ids[-1] in (END, RETURN, ENDOFTEXT):
        ids[-1] = CALL
    elif not ids or ids[-1] != CALL:
        ids.append(CALL)
    return ids


def _render(result: Answered, vocabulary: Vocabulary) -> list[int]:
    message = builtin_result if result.is_builtin else tool_result
    return render_message(message(result.recipient, result.text), vocabulary)


def _cut(rendered: list[int], room: int, vocabulary: Vocabulary) -> list[int]:
    note = vocabulary.encode(CUT)
    header = rendered.index(MESSAGE) + 1
    return [*rendered[: max(room - len(note) - 1, header)], *note, END]
