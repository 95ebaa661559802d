"""Responses that clients refer to by id: `previous_response_id`, item references, GET and DELETE.

They are in this process's memory. A caller sees only its own. When the memory is full, the caller that holds the most
loses what it has not used for longest, so that no caller can evict the responses of one that holds less.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from gptoss.api.http.errors import InvalidRequest, NotFound
from gptoss.api.responses.input.items import placed_items
from gptoss.api.responses.schema import ResponsesRequest
from gptoss.api.responses.tools.placed import PlacedItem
from gptoss.lru_cache import LruCache

Item = dict[str, Any]
ID_PREFIX = {
    "message": "msg_",
    "function_call": "fc_",
    "function_call_output": "fco_",
    "reasoning": "rs_",
    "custom_tool_call": "ctc_",
    "custom_tool_call_output": "ctco_",
}
REFERENCE = "item_reference"
RESPONSE_BYTES, ITEM_BYTES = 500, 130  # what one costs in addition to its JSON, measured by tracemalloc


@dataclass(frozen=True, slots=True)
class StoredResponse:
    previous: str | None  # the id of the response that it continues
    input: bytes  # JSON: the items of its own request
    body: bytes  # JSON: the response as it was sent
    item_ids: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        return RESPONSE_BYTES + ITEM_BYTES * len(self.item_ids) + len(self.input) + len(self.body)

    def items(self) -> list[Item]:
        """The items of its request, then those that the model wrote."""
        return [*msgspec.json.decode(self.input), *msgspec.json.decode(self.body)["output"]]


def _unbounded() -> LruCache[str, StoredResponse]:
    """The store bounds all callers together."""
    return LruCache(math.inf, lambda _, stored: stored.num_bytes)


@dataclass(slots=True)
class _CallerResponses:
    """What one caller has stored."""

    responses: LruCache[str, StoredResponse] = field(default_factory=_unbounded)
    holder_of: dict[str, str] = field(default_factory=dict)  # item id: response id

    @property
    def num_bytes(self) -> int:
        return self.responses.weight

    def add(self, response_id: str, stored: StoredResponse) -> None:
        self.responses.put(response_id, stored)
        self.holder_of |= dict.fromkeys(stored.item_ids, response_id)

    def remove(self, response_id: str) -> None:
        stored = self.responses.pop(response_id)
        for item_id in stored.item_ids:
            if self.holder_of.get(item_id) == response_id:
                del self.holder_of[item_id]


class ResponseStore:
    def __init__(self, max_bytes: int) -> None:
        """0: nothing is stored."""
        self._max_bytes = max_bytes
        self._of_caller: dict[str, _CallerResponses] = {}  # by caller; none is empty

    def __len__(self) -> int:
        return sum(len(own.responses) for own in self._of_caller.values())

    @property
    def num_bytes(self) -> int:
        return sum(own.num_bytes for own in self._of_caller.values())

    @property
    def enabled(self) -> bool:
        return self._max_bytes > 0

    def add(self, caller: str, response: Item, inputs: Sequence[Item], *, previous: str | None) -> bool:
        """Stores a response; returns whether it fits: False if it alone is larger than the store.

        `inputs`: the items of its own request.
        """
        listed = [_as_input_item(item) for item in inputs]
        stored = StoredResponse(
            previous,
            msgspec.json.encode(listed),
            msgspec.json.encode(response),
            tuple(item["id"] for item in (*listed, *response["output"])),
        )
        if stored.num_bytes > self._max_bytes:
            return False
        while self.num_bytes + stored.num_bytes > self._max_bytes:
            self._evict(caller, stored.num_bytes)
        self._of_caller.setdefault(caller, _CallerResponses()).add(response["id"], stored)
        return True

    def get(self, caller: str, response_id: str) -> StoredResponse:
        """The caller's response of this id. Raises NotFound."""
        own = self._of_caller.get(caller)
        stored = None if own is None else own.responses.get(response_id)
        if stored is None:
            raise NotFound(f"Response with id '{response_id}' not found.", "response_id", "response_not_found")
        return stored

    def delete(self, caller: str, response_id: str) -> None:
        """Removes a response. Its conversation's later responses cannot be continued any more.

        Raises NotFound.
        """
        self.get(caller, response_id)
        self._remove(caller, response_id)

    def conversation(self, caller: str, response_id: str) -> list[Item]:
        """All items up to the end of this response, the oldest first. Raises NotFound."""
        chain: list[StoredResponse] = []
        before: str | None = response_id
        while before is not None:
            chain.append(self.get(caller, before))
            before = chain[-1].previous
        return [item for stored in reversed(chain) for item in stored.items()]

    def inputs(self, caller: str, response_id: str) -> list[Item]:
        """What a response was made from, the oldest first. Raises NotFound."""
        stored = self.get(caller, response_id)
        before = [] if stored.previous is None else self.conversation(caller, stored.previous)
        return [*before, *msgspec.json.decode(stored.input)]

    def item(self, caller: str, item_id: str, read: dict[str, dict[str, Item]] | None = None) -> Item | None:
        """`read` keeps the items of the responses that have been decoded for this request already."""
        own = self._of_caller.get(caller)
        holder = None if own is None else own.holder_of.get(item_id)
        if holder is None:
            return None
        read = {} if read is None else read
        if holder not in read:
            read[holder] = {item["id"]: item for item in self.get(caller, holder).items()}
        return read[holder][item_id]

    def _evict(self, caller: str, num_bytes: int) -> None:
        """Frees the oldest response of the caller that holds the most, with `num_bytes` more for this one."""

        def held(one: str) -> int:
            return self._of_caller[one].num_bytes + (num_bytes if one == caller else 0)

        largest = max(self._of_caller, key=held)
        self._remove(largest, next(iter(self._of_caller[largest].responses)))

    def _remove(self, caller: str, response_id: str) -> None:
        self._of_caller[caller].remove(response_id)
        if not self._of_caller[caller].responses:
            del self._of_caller[caller]


def _as_input_item(item: Item) -> Item:
    """An input item as OpenAI lists it: with an id, and the text of a message as parts."""
    kind = item.get("type") or "message"
    made = {name: value for name, value in item.items() if value is not None}
    made |= {"type": kind, "status": made.get("status", "completed")}
    if not isinstance(made.get("id"), str):
        made["id"] = ID_PREFIX.get(kind, "item_") + secrets.token_hex(24)
    if kind == "message" and isinstance(item["content"], str):
        part = "output_text" if item["role"] == "assistant" else "input_text"
        made["content"] = [{"type": part, "text": item["content"]}]
    return made


@dataclass(frozen=True, slots=True)
class ResolvedInput:
    own: list[PlacedItem]  # of this request, none of them a reference
    earlier: list[PlacedItem]  # of the responses that it continues
    uses_store: bool  # whether anything here was not sent with the request

    @property
    def items(self) -> list[PlacedItem]:
        return [*self.earlier, *self.own]


def resolve(request: ResponsesRequest, store: ResponseStore, caller: str) -> ResolvedInput:
    """The input of a request with the items of earlier responses and references filled in.

    Raises InvalidRequest if `previous_response_id` is not stored, NotFound if a referenced item is not.
    """
    earlier: list[PlacedItem] = []
    if request.previous_response_id is not None:
        field = "previous_response_id"
        try:
            before = store.conversation(caller, request.previous_response_id)
        except NotFound as error:
            raise InvalidRequest(
                f"Previous response: {error.message} {_missing_reason(store)}", field, "previous_response_not_found"
            ) from None
        earlier = [PlacedItem(item, field) for item in before]
    read: dict[str, dict[str, Item]] = {}
    own = [
        PlacedItem(_resolve_reference(placed, store, caller, read), placed.where)
        for placed in placed_items(request.input)
    ]
    return ResolvedInput(own, earlier, uses_store=bool(earlier or read))


def _resolve_reference(placed: PlacedItem, store: ResponseStore, caller: str, read: dict[str, dict[str, Item]]) -> Any:
    """What an item reference stands for; any other item as it is. `{"id": ...}` alone is a reference too."""
    given = placed.item
    if not isinstance(given, dict):
        return given
    if given.get("type") != REFERENCE and given.keys() != {"id"}:
        return given
    item_id = given.get("id")
    if not isinstance(item_id, str):
        raise InvalidRequest("An item reference has the id of an item.", f"{placed.where}.id", "invalid_type")
    item = store.item(caller, item_id, read)
    if item is None:
        raise NotFound(
            f"Item with id '{item_id}' not found. {_missing_reason(store)}", f"{placed.where}.id", "item_not_found"
        )
    return item


def _missing_reason(store: ResponseStore) -> str:
    if not store.enabled:
        return "This server stores no responses (response_store_bytes is 0): send the earlier items in 'input'."
    return (
        "It was sent with 'store': false, was deleted, made room for newer ones, or went when the server restarted. "
        "Send the earlier items in 'input'."
    )
