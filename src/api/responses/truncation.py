"""`truncation: "auto"`: the items that are cut from a conversation too long for the model.

Whole items are cut, the oldest first, never a call without its results. Never cut are the instructions (the field, and
the system and developer messages at the beginning), the last user message and the last item.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gptoss.api.responses.tools.placed import PlacedItem

ANSWER_TOKENS = 1024  # left for the answer after a cut, unless the request asks for another number
NEVER_CUT = (
    "With 'truncation' set to 'auto', tools, instructions, the last user message and the last item are never cut, and "
    "these alone are too long."
)
_NEVER = -1


class Cuts:
    """The ways of cutting a conversation; cut 0 leaves all items."""

    def __init__(self, items: Sequence[PlacedItem]) -> None:
        self._num_items = len(items)
        fixed = _fixed(items)
        self._cuttable = [index for index in range(len(items)) if index not in fixed]
        self._sizes = _allowed_sizes(items, self._cuttable)

    def __len__(self) -> int:
        return len(self._sizes)

    def num_cut(self, cut: int) -> int:
        return self._sizes[cut]

    def kept(self, cut: int) -> list[int]:
        """The indices of the items that a cut leaves."""
        gone = set(self._cuttable[: self._sizes[cut]])
        return [index for index in range(self._num_items) if index not in gone]

    def smallest(self, fits: Callable[[list[int]], bool], first: int = 0) -> int | None:
        """The first cut, from `first` on, whose items fit; None: not even the largest leaves few enough."""
        cut = bisect_left(range(len(self)), True, lo=first, key=lambda cut: fits(self.kept(cut)))
        return cut if cut < len(self) else None


def answer_tokens(asked: int | None, max_model_len: int) -> int:
    """The tokens that a cut leaves for the answer: as many as requested, at most a quarter of the context."""
    return max(1, min(asked or ANSWER_TOKENS, max_model_len // 4))


def _field(item: PlacedItem, name: str) -> Any:
    return item.item.get(name) if isinstance(item.item, Mapping) else None


def _fixed(items: Sequence[PlacedItem]) -> set[int]:
    fixed = {len(items) - 1}
    for index, item in enumerate(items):
        if _field(item, "role") not in ("system", "developer"):
            break
        fixed.add(index)
    users = [index for index, item in enumerate(items) if _field(item, "role") == "user"]
    return fixed | set(users[-1:])


def _allowed_sizes(items: Sequence[PlacedItem], cuttable: Sequence[int]) -> list[int]:
    """The numbers of cuttable items that can be cut without separating a call from its results."""
    positions = {index: number for number, index in enumerate(cuttable)}
    called: dict[Any, int] = {}  # by call id: the last call's position among the cuttable items
    needed = [number + 1 for number in range(len(cuttable))]  # how many must go so that this one is cut
    for index, item in enumerate(items):
        kind, call_id = _field(item, "type"), _field(item, "call_id")
        if not isinstance(kind, str) or not isinstance(call_id, str):
            continue
        if kind.endswith("_call"):
            called[call_id] = positions.get(index, _NEVER)
        elif kind.endswith("_output") and called.get(call_id, _NEVER) != _NEVER:
            needed[called[call_id]] = positions.get(index, len(cuttable)) + 1
    sizes, most = [0], 0
    for number in range(len(cuttable)):
        most = max(most, needed[number])
        if most == number + 1:
            sizes.append(most)
    return sizes
