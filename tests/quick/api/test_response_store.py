"""Responses that clients come back to: what is kept, for whom, and how much of it."""

from __future__ import annotations

import tracemalloc
from typing import Any

import pytest

from gptoss.api.http.errors import InvalidRequest, NotFound
from gptoss.api.responses.schema import ResponsesRequest
from gptoss.api.responses.store import ResponseStore, resolve

ASK = {"role": "user", "content": "Weather?"}


def response(name: str, *texts: str) -> dict[str, Any]:
    output = [
        {
            "id": f"msg_{name}_{number}",
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": text}],
        }
        for number, text in enumerate(texts)
    ]
    return {"id": name, "object": "response", "output": output}


def asked(**fields: Any) -> ResponsesRequest:
    return ResponsesRequest.model_validate({"model": "m", "input": "And now?"} | fields)


def texts(items: list[dict[str, Any]]) -> list[str]:
    return [item["content"][0]["text"] for item in items]


def stored(store: ResponseStore, caller: str) -> list[str]:
    """The ids, the least recently used first."""
    return list(store._of_caller[caller].responses)


@pytest.fixture
def store() -> ResponseStore:
    """a, then b that goes on from it, of one caller."""
    store = ResponseStore(100_000)
    assert store.add("me", response("a", "sun"), [ASK], previous=None)
    more = {"type": "message", "role": "user", "content": "And rain?", "id": "mine"}
    assert store.add("me", response("b", "no", "none"), [more], previous="a")
    return store


def test_a_conversation_is_all_items_in_order(store: ResponseStore) -> None:
    assert texts(store.conversation("me", "b")) == ["Weather?", "sun", "And rain?", "no", "none"]
    assert texts(store.inputs("me", "b")) == ["Weather?", "sun", "And rain?"]
    assert texts(store.inputs("me", "a")) == ["Weather?"]


def test_items_of_the_input_have_ids_and_parts(store: ResponseStore) -> None:
    first, _, own = store.inputs("me", "b")
    assert first["id"].startswith("msg_") and first["type"] == "message"
    assert first["content"] == [{"type": "input_text", "text": "Weather?"}]
    assert own["id"] == "mine" and store.item("me", "mine") == own


def test_a_caller_sees_its_own_alone(store: ResponseStore) -> None:
    assert store.item("you", "msg_a_0") is None
    for ask in store.get, store.delete, store.conversation, store.inputs:
        with pytest.raises(NotFound):
            ask("you", "a")
    assert len(store) == 2


def test_what_was_deleted_is_gone_and_so_is_what_went_on_from_it(store: ResponseStore) -> None:
    store.delete("me", "a")
    assert store.item("me", "msg_a_0") is None and store.item("me", "msg_b_0") is not None
    with pytest.raises(NotFound):
        store.conversation("me", "b")
    store.delete("me", "b")
    assert (len(store), store.num_bytes) == (0, 0)


def test_the_least_recently_used_goes_first() -> None:
    one = ResponseStore(100_000)
    assert one.add("me", response("x", "text"), [ASK], previous=None)
    store = ResponseStore(3 * one.num_bytes)
    for name in "abc":
        assert store.add("me", response(name, "text"), [ASK], previous=None)
    store.get("me", "a")
    assert store.add("me", response("d", "text"), [ASK], previous=None)
    assert stored(store, "me") == ["c", "a", "d"]
    assert store.num_bytes == 3 * one.num_bytes
    assert store.item("me", "msg_b_0") is None


def test_a_caller_that_stores_much_pushes_out_no_other() -> None:
    one = ResponseStore(100_000)
    assert one.add("me", response("x", "text"), [ASK], previous=None)
    store = ResponseStore(4 * one.num_bytes)
    assert store.add("me", response("a", "text"), [ASK], previous=None)
    for name in "pqrstu":
        assert store.add("you", response(name, "text"), [ASK], previous=None)
    assert store.get("me", "a") and len(store) == 4
    assert stored(store, "you") == ["s", "t", "u"]
    assert store.add("me", response("b", "text"), [ASK], previous="a")
    assert texts(store.conversation("me", "b")) == ["Weather?", "text", "Weather?", "text"]
    assert stored(store, "you") == ["t", "u"]


def test_what_is_stored_is_not_what_makes_room_for_it() -> None:
    store = ResponseStore(10_000)
    assert store.add("you", response("a", "x" * 4000), [ASK], previous=None)
    assert store.add("me", response("b", "x" * 8000), [ASK], previous=None)
    assert store.get("me", "b") and len(store) == 1


def test_many_small_responses_count_what_they_cost_beside_their_text() -> None:
    store = ResponseStore(1_000_000)
    tracemalloc.start()
    for number in range(400):
        assert store.add("me", response(f"r{number}", "text"), [ASK], previous=None)
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 0.8 < store.num_bytes / used < 1.5


def test_what_is_larger_than_the_store_is_not_stored(store: ResponseStore) -> None:
    assert not store.add("me", response("c", "x" * 100_000), [ASK], previous=None)
    assert len(store) == 2
    assert not ResponseStore(0).enabled


def test_an_id_of_the_client_that_is_no_string_is_replaced(store: ResponseStore) -> None:
    assert store.add("me", response("c"), [ASK | {"id": ["x"]}, ASK | {"id": None}], previous=None)
    assert all(item["id"].startswith("msg_") for item in store.inputs("me", "c"))


def test_references_become_what_they_stand_for(store: ResponseStore) -> None:
    items = [{"type": "item_reference", "id": "msg_b_1"}, {"id": "msg_a_0"}, ASK]
    resolved = resolve(asked(input=items, previous_response_id="a"), store, "me")
    assert texts([placed.item for placed in resolved.own[:2]]) == ["none", "sun"]
    assert [placed.where for placed in resolved.own] == ["input[0]", "input[1]", "input[2]"]
    assert texts([placed.item for placed in resolved.earlier]) == ["Weather?", "sun"]
    assert {placed.where for placed in resolved.earlier} == {"previous_response_id"}
    assert resolved.items == resolved.earlier + resolved.own


@pytest.mark.parametrize(
    ("fields", "param", "code", "status"),
    [
        ({"previous_response_id": "z"}, "previous_response_id", "previous_response_not_found", 400),
        ({"input": [ASK, {"id": "z"}]}, "input[1].id", "item_not_found", 404),
        ({"input": [{"type": "item_reference"}]}, "input[0].id", "invalid_type", 400),
    ],
)
def test_what_is_not_there_is_named(
    store: ResponseStore, fields: dict[str, Any], param: str, code: str, status: int
) -> None:
    for kept, why in (store, "restarted"), (ResponseStore(0), "response_store_bytes"):
        with pytest.raises(InvalidRequest) as caught:
            resolve(asked(**fields), kept, "me")
        error = caught.value
        assert (error.param, error.code, error.status) == (param, code, status)
        assert why in error.message or code == "invalid_type"
