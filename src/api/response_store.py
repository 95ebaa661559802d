"""Responses that a client may come back to by their ids: `previous_response_id`, item references, GET and DELETE.

They are in this process's memory, the least recently used go first, and a caller sees its own alone.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from src.api.errors import InvalidRequest, NotFound
from src.api.responses_input import PlacedItem, ResponsesRequest

Item = dict[str, Any]
ID_PREFIX = {"message": "msg_", "function_call": "fc_", "function_call_output": "fco_", "reasoning": "rs_"}  # fmt: skip
REFERENCE = "item_reference"


@dataclass(frozen=True, slots=True)
class StoredResponse:
    previous: str | None  # the id of the response that it went on from
    input: bytes  # JSON: the items of its own request
    body: bytes  # JSON: the response as it was sent
    item_ids: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        return len(self.input) + len(self.body)

    def items(self) -> list[Item]:
        """Of its request, then those that the model wrote."""
        return [*msgspec.json.decode(self.input), *msgspec.json.decode(self.body)["output"]]


class ResponseStore:
    def __init__(self, max_bytes: int) -> None:
        """0: nothing is stored."""
        self._max_bytes = max_bytes
        self._responses: OrderedDict[tuple[str, str], StoredResponse] = OrderedDict()
        self._holder_of: dict[tuple[str, str], str] = {}  # (caller, item id): response id
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._responses)

    @property
    def enabled(self) -> bool:
        return self._max_bytes > 0

    def add(
        self, caller: str, response: Item, inputs: Sequence[Item], *, previous: str | None
    ) -> bool:
        """Whether it is stored; False: it is larger than all that may be. `inputs`: the items of its own request."""
        listed = [_listed(item) for item in inputs]
        stored = StoredResponse(
            previous,
            msgspec.json.encode(listed),
            msgspec.json.encode(response),
            tuple(item["id"] for item in (*listed, *response["output"])),
        )
        if stored.num_bytes > self._max_bytes:
            return False
        self._responses[caller, response["id"]] = stored
        self._holder_of |= {(caller, item_id): response["id"] for item_id in stored.item_ids}
        self.num_bytes += stored.num_bytes
        while self.num_bytes > self._max_bytes:
            self._remove(*next(iter(self._responses)))
        return True

    def get(self, caller: str, response_id: str) -> StoredResponse:
        """Raises NotFound."""
        stored = self._responses.get((caller, response_id))
        if stored is None:
            raise NotFound(
                f"Response with id '{response_id}' not found.", "response_id", "response_not_found"
            )
        self._responses.move_to_end((caller, response_id))
        return stored

    def delete(self, caller: str, response_id: str) -> None:
        """Raises NotFound. Responses that went on from it cannot be gone on from any more."""
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

    def item(self, caller: str, item_id: str) -> Item | None:
        holder = self._holder_of.get((caller, item_id))
        if holder is None:
            return None
        return next(i for i in self.get(caller, holder).items() if i["id"] == item_id)

    def _remove(self, caller: str, response_id: str) -> None:
        stored = self._responses.pop((caller, response_id))
        self.num_bytes -= stored.num_bytes
        for item_id in stored.item_ids:
            if self._holder_of.get((caller, item_id)) == response_id:
                del self._holder_of[caller, item_id]


def _listed(item: Item) -> Item:
    """An input item as OpenAI lists it: with an id, and the text of a message as parts."""
    kind = item.get("type", "message")
    made = {name: value for name, value in item.items() if value is not None}
    made |= {"type": kind, "status": made.get("status", "completed")}
    if not isinstance(made.get("id"), str):
        made["id"] = ID_PREFIX[kind] + secrets.token_hex(24)
    if kind == "message" and isinstance(item["content"], str):
        part = "output_text" if item["role"] == "assistant" else "input_text"
        made["content"] = [{"type": part, "text": item["content"]}]
    return made


@dataclass(frozen=True, slots=True)
class ResolvedInput:
    own: list[PlacedItem]  # of this request, none of them a reference
    earlier: list[PlacedItem]  # of the responses that it goes on from

    @property
    def items(self) -> list[PlacedItem]:
        return [*self.earlier, *self.own]


def resolve(request: ResponsesRequest, store: ResponseStore, caller: str) -> ResolvedInput:
    """Raises InvalidRequest for an id that is not stored, and NotFound for such a reference."""
    earlier: list[PlacedItem] = []
    if request.previous_response_id is not None:
        field = "previous_response_id"
        try:
            before = store.conversation(caller, request.previous_response_id)
        except NotFound as error:
            raise InvalidRequest(
                f"Previous response: {error.message} {_why(store)}", field, "previous_response_not_found"
            ) from None  # fmt: skip
        earlier = [PlacedItem(item, field) for item in before]
    own = [
        PlacedItem(_referred(placed, store, caller), placed.where) for placed in request.placed()
    ]
    return ResolvedInput(own, earlier)


def _referred(placed: PlacedItem, store: ResponseStore, caller: str) -> Any:
    """What an item reference stands for; any other item as it is. `{"id": ...}` alone is a reference too."""
    given = placed.item
    if not isinstance(given, dict):
        return given
    if given.get("type") != REFERENCE and given.keys() != {"id"}:
        return given
    item_id = given.get("id")
    if not isinstance(item_id, str):
        raise InvalidRequest(
            "An item reference has the id of an item.", f"{placed.where}.id", "invalid_type"
        )
    item = store.item(caller, item_id)
    if item is None:
        raise NotFound(
            f"Item with id '{item_id}' not found. {_why(store)}",
            f"{placed.where}.id",
            "item_not_found",
        )
    return item


def _why(store: ResponseStore) -> str:
    if not store.enabled:
        return "This server stores no responses (response_store_bytes is 0): send the earlier items in 'input'."
    return (
        "It was sent with 'store': false, was deleted, made room for newer ones, or went when the server restarted. "
        "Send the earlier items in 'input'."
    )
