"""Prefixes are reused by the token: which blocks are copied, what is copied, and when."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss.engine.core.kv_cache_manager import NULL_BLOCK, SLIDING_GROUP, KVCacheManager
from gptoss.engine.core.prefix_index import CachedBlock, PrefixIndex, common_tokens, token_bytes
from gptoss.engine.core.request import Request
from gptoss.engine.messages import ModelRunnerOutput
from gptoss.engine.sampling_params import SamplingParams
from gptoss.engine.worker.block_copies import BlockCopier
from gptoss.kernels.layers import LayerCache
from tests.support.fake_runner import FakeRunner, make_request, make_scheduler

IDS = list(range(1000, 1600))


def run(runner: FakeRunner, name: str, ids: list[int], max_tokens: int = 1, **options: str) -> Request:
    request = make_request(name, ids, max_tokens, **options)
    runner.scheduler.add_request(request)
    runner.run()
    return request


@pytest.fixture
def runner() -> FakeRunner:
    return FakeRunner(make_scheduler(num_blocks=400))


def test_the_next_turn_goes_on_after_the_last_token_and_copies_nothing(runner: FakeRunner) -> None:
    ids = IDS[:37]
    for turn in range(6):
        request = run(runner, f"turn{turn}", ids, 21)
        # the last token of an answer is sampled and not computed
        assert request.num_cached_tokens == (0 if turn == 0 else len(ids) - 6)
        ids = [*request.token_ids, *range(2000 + 10 * turn, 2005 + 10 * turn)]
    assert runner.num_copies == 0


def test_a_prompt_that_leaves_another_inside_a_block_copies_what_they_share(runner: FakeRunner) -> None:
    run(runner, "a", IDS[:100], 1)
    assert run(runner, "full", [*IDS[:40], 7, 8, 9]).num_cached_tokens == 40
    assert run(runner, "last", [*IDS[:99], 7, 8, 9]).num_cached_tokens == 99
    assert run(runner, "first", [*IDS[:3], 7, 8, 9]).num_cached_tokens == 3
    assert run(runner, "none", [7, 8, 9]).num_cached_tokens == 0
    assert runner.num_copies == 3 * 2
    # what was copied is there for others as well
    assert run(runner, "again", [*IDS[:40], 7, 8, 10]).num_cached_tokens == 42


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 32, 33])
def test_the_last_token_is_always_computed(runner: FakeRunner, length: int) -> None:
    run(runner, "a", IDS[:length])
    assert run(runner, "b", IDS[:length]).num_cached_tokens == length - 1


def test_a_running_request_lends_what_it_has_computed_so_far(runner: FakeRunner) -> None:
    runner.scheduler.add_request(a := make_request("a", IDS[:37], 500))
    for _ in range(6):
        runner.step()
    assert a.num_computed_tokens == 42
    runner.scheduler.add_request(b := make_request("b", [*a.token_ids, 7], 1))
    runner.step()
    assert b.num_cached_tokens == 42
    runner.scheduler.add_request(c := make_request("c", [*IDS[:35], 7], 1))
    runner.step()
    assert c.num_cached_tokens == 35


def test_what_is_not_computed_yet_is_not_lent(runner: FakeRunner) -> None:
    """Both arrive for one step; the second shares less than it would wait for."""
    for name, ids in (("a", IDS[:37]), ("b", [*IDS[:9], 7])):
        runner.scheduler.add_request(make_request(name, ids, 5))
    out = runner.step()
    assert out.num_scheduled_tokens == {"a": 37, "b": 10} and not out.block_copies


def test_choices_wait_a_step_for_a_prompt_shorter_than_a_block() -> None:
    runner = FakeRunner(make_scheduler(block_size=64))
    for i in range(3):
        runner.scheduler.add_request(make_request(f"c{i}", IDS[:40], 5))
    assert runner.step().num_scheduled_tokens == {"c0": 40}
    out = runner.step()
    assert out.num_scheduled_tokens == {"c0": 1, "c1": 1, "c2": 1} and len(out.block_copies) == 4
    runner.run()


@pytest.mark.parametrize("options", [{"cache_salt": "x"}, {"adapter_key": "x"}])
def test_salts_and_adapters_separate_unfinished_blocks_too(runner: FakeRunner, options: dict[str, str]) -> None:
    run(runner, "a", IDS[:30])
    assert run(runner, "other", IDS[:30], **options).num_cached_tokens == 0
    assert run(runner, "same", IDS[:30], **options).num_cached_tokens == 29


def test_prefix_caching_off_copies_nothing() -> None:
    runner = FakeRunner(make_scheduler(enable_prefix_caching=False))
    for name in "ab":
        assert run(runner, name, IDS[:100]).num_cached_tokens == 0
    assert runner.num_copies == 0 and not len(runner.scheduler._kv._index)


def test_preempted_requests_go_on_where_they_were(runner: FakeRunner) -> None:
    runner.scheduler.add_request(a := make_request("a", IDS[:37], 30))
    for _ in range(6):
        runner.step()
    runner.scheduler._preempt(a)
    assert runner.step().num_scheduled_tokens == {"a": 1}
    runner.run()
    assert len(runner.outputs["a"]) == 30


def test_a_failed_step_is_not_reused(runner: FakeRunner) -> None:
    runner.scheduler.add_request(make_request("a", IDS[:40], 5))
    runner.scheduler.update_from_output(runner.scheduler.schedule(), ModelRunnerOutput({}, {}, {"a": "bad"}))
    runner.scheduler._kv.check_integrity()
    runner.scheduler.add_request(b := make_request("b", IDS[:40], 1))
    runner.scheduler.schedule()
    assert b.num_cached_tokens == 0


# --- sliding blocks ---


@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 127, 128, 129])
@pytest.mark.parametrize("size", [16, 64])
def test_exactly_the_blocks_of_the_window_are_needed(window: int, size: int) -> None:
    """Where one of them is gone nothing is found at the prompt's end; the others are not asked for."""
    for length in (3 * size, 3 * size + 1, 3 * size + size // 2, 4 * size - 1):
        first = max(0, length - window + 1) // size
        for gone in range(-(-length // size)):
            kv = KVCacheManager(100, size, window)
            a = Request("a", IDS[:length], SamplingParams(max_tokens=1, seed=0))
            found = kv.get_computed_blocks(a)
            assert kv.allocate_slots(a, length, found) is not None
            a.num_computed_tokens = length
            kv.cache_blocks(a)
            sliding = list(kv._owned["a"].groups[SLIDING_GROUP])
            kv.free(a)
            kv._index.remove(sliding[gone])
            found = kv.get_computed_blocks(Request("b", IDS[: length + 1], a.params))
            if gone < first:
                assert found.num_tokens == length
                needed = [*[NULL_BLOCK] * min(first, length // size), *sliding[first : length // size]]
                assert list(found.blocks[SLIDING_GROUP]) == needed
            else:
                assert found.num_tokens < length


def test_a_shorter_prefix_is_found_where_the_longest_lacks_its_window(runner: FakeRunner) -> None:
    kv = runner.scheduler._kv
    a = run(runner, "a", IDS[:300])
    sliding = list(kv._index._full[SLIDING_GROUP].values())
    for block in sliding[-3:]:
        kv._index.remove(block)
    found = kv.get_computed_blocks(make_request("b", IDS[:400]))
    assert found.num_tokens == 15 * 16 and a.num_tokens == 301


# --- few blocks ---


def test_with_no_block_to_spare_the_source_itself_is_used() -> None:
    """Eight usable blocks, all of which the second request needs; copying would need two more."""
    runner = FakeRunner(make_scheduler(num_blocks=9, max_num_batched_tokens=64))
    run(runner, "a", IDS[:64])
    assert run(runner, "b", [*IDS[:60], 7, 8, 9]).num_cached_tokens == 60
    assert runner.num_copies == 0


def test_sources_stay_until_the_step_is_scheduled() -> None:
    """Eight usable blocks: the second request's copy must not be overwritten by the third's blocks."""
    runner = FakeRunner(make_scheduler(num_blocks=13, max_num_batched_tokens=64))
    run(runner, "a", IDS[:32])
    for name, ids in (("b", [*IDS[:20], 7]), ("c", [8] * 30), ("d", [9] * 30)):
        runner.scheduler.add_request(make_request(name, ids, 3))
    out = runner.step()
    assert len(out.block_copies) == 2 and len(out.num_scheduled_tokens) > 1
    runner.run()


@given(seed=st.integers(0, 2**32), num_blocks=st.integers(26, 90), lookahead=st.integers(0, 1))
@settings(max_examples=40, deadline=None)
def test_whatever_is_reused_is_what_the_request_would_have_computed(seed: int, num_blocks: int, lookahead: int) -> None:
    """Conversations that branch, in a small cache; FakeRunner compares what every token sees."""
    rng = random.Random(seed)
    runner = FakeRunner(make_scheduler(num_blocks=num_blocks, lookahead=lookahead), rng, stop_chance=0.1)
    limit = min(300, runner.scheduler._kv.max_request_tokens(64)) - 30
    texts: list[list[int]] = [[], IDS[:50]]
    requests: list[Request] = []
    for number in range(40):
        text = rng.choice(texts)
        ids = [*text[: rng.randrange(len(text) + 1)], *rng.choices(range(5), k=rng.randrange(1, 40))]
        if len(ids) < limit:
            requests.append(make_request(f"r{number}", ids, rng.randrange(1, 25), cache_salt=rng.choice(["", "", "s"])))
            runner.scheduler.add_request(requests[-1])
        for _ in range(rng.randrange(4)):
            runner.step()
        if rng.random() < 0.1 and requests:
            runner.scheduler.finish_requests([rng.choice(requests).request_id])
        texts.extend(list(request.token_ids) for request in requests[-2:])
    runner.run()
    assert runner.scheduler._kv.usage == 0 and sum(request.num_cached_tokens for request in requests) > 0


# --- the index ---


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), max_size=12), st.lists(st.integers(0, 2)))
@settings(max_examples=100, deadline=None)
def test_the_longest_match_is_found(blocks: list[list[int]], wanted: list[int]) -> None:
    index = PrefixIndex(1)
    for number, tokens in enumerate(blocks):
        index.add(number, CachedBlock(0, b"p", token_bytes(tokens)))
        index.check_integrity()
    shared = [next((n for n, (a, b) in enumerate(zip(t, wanted, strict=False)) if a != b), min(len(t), len(wanted)))
              for t in blocks]  # fmt: skip
    block, count = index.longest(0, b"p", token_bytes(wanted))
    assert count == max(shared, default=0)
    if count:
        assert shared[block] == count
    for number in range(len(blocks)):
        index.remove(number)
        index.check_integrity()
    assert not len(index)


def test_common_tokens_are_whole_ones() -> None:
    a = token_bytes([1, 2, 0x01020304])
    for last in (0x01020305, 0x01020204, 0x02020304, 0):
        assert common_tokens(a, token_bytes([1, 2, last])) == 2
    assert common_tokens(a, token_bytes([1, 2])) == 2
    assert common_tokens(a, a) == 3


# --- the worker's part ---


@dataclass(frozen=True)
class ScaledCache(LayerCache):
    scale: torch.Tensor | None = None
    factor: float = 1.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.int8])
def test_a_block_is_copied_in_every_tensor_once(dtype: torch.dtype) -> None:
    numbers = torch.arange(5 * 4 * 2 * 3) % 97
    tensors = [(numbers + i).reshape(5, 4, 2, 3).to(dtype) for i in range(4)]
    scale = torch.arange(5 * 4 * 2.0).reshape(5, 4, 2)
    cache = [LayerCache(*tensors[:2]), LayerCache(*tensors[:2]), ScaledCache(*tensors[2:], scale)]
    expected = [t.float()[[0, 1, 2, 1, 2]] for t in (*tensors, scale)]
    BlockCopier(cache)([(1, 3), (2, 4)])
    for tensor, wanted in zip((*tensors, scale), expected, strict=True):
        assert torch.equal(tensor.float(), wanted)


def test_new_requests_may_share_a_source() -> None:
    cache = LayerCache(torch.arange(24.0).reshape(4, 6), torch.zeros(4, 6))
    BlockCopier([cache])([(1, 2), (1, 3)])
    assert torch.equal(cache.key[1:], cache.key[1].expand(3, 6))
