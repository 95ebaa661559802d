"""Copies between host and device that must not wait for what the device is given meanwhile."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gptoss.engine.sampling_params import LogitBias, SamplingParams
from gptoss.engine.worker.sampling.sampler import sample
from gptoss.kernels.device_copy import PendingReadback, to_device, to_device_together
from tests.support.helpers import sampling_row

BUSY_CYCLES = 500_000_000  # some tenths of a second
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is nothing to wait for without a GPU")


def busy() -> torch.cuda.Event:
    """Gives the device something long to do. -> what has happened when it is done."""
    torch.cuda._sleep(BUSY_CYCLES)
    event = torch.cuda.Event()
    event.record()
    return event


@needs_gpu
def test_reading_does_not_wait_for_what_came_after() -> None:
    tokens, peaks = torch.arange(3, device="cuda"), torch.ones(2, device="cuda")
    reading = PendingReadback([tokens, peaks])
    later = busy()
    assert reading.values() == [[0, 1, 2], [1.0, 1.0]]
    assert not later.query()


@needs_gpu
def test_nothing_waits_for_what_goes_to_the_device() -> None:
    earlier = busy()
    made = [
        to_device([1.0, 2.0], torch.float32, torch.device("cuda")),
        to_device(np.ones((2, 6284), np.int32), torch.int32, torch.device("cuda")),
    ]
    assert not earlier.query()
    assert made[0].tolist() == [1.0, 2.0] and int(made[1].sum()) == 2 * 6284


@needs_gpu
def test_the_next_step_is_started_before_the_tokens_are_there() -> None:
    vocab = 201_088
    wishes = [
        {"temperature": 0.0},
        {},
        {"top_p": 0.9},
        {"top_k": 40, "min_p": 0.05},
        {"repetition_penalty": 1.2, "top_p": 0.5},
        {"presence_penalty": 0.5, "logprobs": 3},
        {"logit_bias": LogitBias.of({7: 2.0})},
        {"min_tokens": 9, "stop_token_ids": (8,)},
    ]
    rows = [
        sampling_row(SamplingParams(max_tokens=9, seed=i, **wish), np.arange(40), np.arange(3))
        for i, wish in enumerate(wishes)
    ]
    masks = np.full((2, vocab // 32), -1, np.int32)
    logits = torch.randn(len(rows), vocab, device="cuda")
    sample(logits.clone(), rows, [0, 2], masks, "triton")  # compiles
    done: list[bool] = []
    given = logits.clone()
    earlier = busy()
    out = sample(given, rows, [0, 2], masks, "triton", lambda _: done.append(earlier.query()))
    assert done[0] is False
    assert out.finite == [True] * len(rows)


def test_arrays_that_travel_together_arrive_whole_and_aligned() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    arrays = [np.array([0.5, 2.5], np.float32), np.arange(3, dtype=np.int32), np.full((2, 5), -1, np.int32)]
    arrays[2].setflags(write=False)
    made = to_device_together(arrays, device)
    assert [t.tolist() for t in made] == [array.tolist() for array in arrays]
    assert [t.dtype for t in made] == [torch.float32, torch.int32, torch.int32]
    assert all((t.data_ptr() - made[0].data_ptr()) % 16 == 0 for t in made)


def test_on_a_cpu_values_are_what_they_are() -> None:
    made = to_device(np.array([1.5, 2.5]), torch.float32, torch.device("cpu"))
    assert made.dtype == torch.float32
    assert PendingReadback([made, torch.tensor([7])]).values() == [[1.5, 2.5], [7]]
