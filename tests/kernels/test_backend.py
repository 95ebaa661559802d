"""One backend is chosen for a device and a type, and all of them read a step's layout alike."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from gptoss.kernels.backend import choose_backend, choose_sampling
from gptoss.kernels.cpu import metadata as cpu_metadata
from gptoss.kernels.cpu import native
from gptoss.kernels.layers import LayerShape, RopeScaling
from gptoss.kernels.reference import attention as reference
from gptoss.kernels.step_layout import StepLayout
from gptoss.kernels.triton import metadata as triton_metadata
from gptoss.kernels.triton import support

CPU = torch.device("cpu")
BLOCK = 4
WINDOW = 5
SHAPE = LayerShape(
    num_heads=2,
    num_kv_heads=1,
    head_dim=64,
    windows=(None, WINDOW),
    rope=RopeScaling(150_000.0, 32.0, 32.0, 1.0, 4096),
    max_positions=16,
    rms_norm_eps=1e-5,
    num_experts=4,
    local_experts=None,
    experts_per_token=2,
    swiglu_limit=7.0,
)


def test_the_backend_follows_from_device_and_type(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_backend(CPU, torch.float32, SHAPE).name == "torch"
    expected = "native" if native.library() is not None else "torch"
    assert choose_backend(CPU, torch.bfloat16, SHAPE).name == expected
    assert choose_sampling(CPU) == expected
    monkeypatch.setattr(native, "library", lambda: None)
    assert choose_backend(CPU, torch.bfloat16, SHAPE).name == choose_sampling(CPU) == "torch"
    monkeypatch.setattr(support, "runs_triton", lambda device, dtype: True)
    backend = choose_backend(CPU, torch.bfloat16, SHAPE, batch_invariant=True)
    assert backend.name == "triton" and backend.is_batch_invariant


def test_int8_is_refused_where_the_native_kernels_do_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    if native.library() is not None:
        assert choose_backend(CPU, torch.bfloat16, SHAPE, dense_dtype="int8").name == "native"
    with pytest.raises(ValueError, match=r"'int8' needs the native CPU kernels.* on cpu in torch.float32"):
        choose_backend(CPU, torch.float32, SHAPE, dense_dtype="int8")
    monkeypatch.setattr(support, "runs_triton", lambda device, dtype: True)
    with pytest.raises(ValueError, match="on cuda:0"):
        choose_backend(torch.device("cuda", 0), torch.bfloat16, SHAPE, dense_dtype="int8")
    monkeypatch.setattr(support, "runs_triton", lambda device, dtype: False)
    monkeypatch.setattr(native, "library", lambda: None)
    with pytest.raises(ValueError, match="on cpu in torch.bfloat16"):
        choose_backend(CPU, torch.bfloat16, SHAPE, dense_dtype="int8")


def test_triton_runs_bfloat16_on_a_gpu_with_matrix_instructions_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(support, "_capability", lambda device: (8, 0))
    assert support.runs_triton(gpu, torch.bfloat16)
    assert not support.runs_triton(gpu, torch.float16) and not support.runs_triton(CPU, torch.bfloat16)
    assert choose_sampling(gpu) == "triton"
    monkeypatch.setattr(support, "_capability", lambda device: (7, 5))
    assert not support.runs_triton(gpu, torch.bfloat16)
    assert choose_sampling(gpu) == "torch"


def layout() -> StepLayout:
    """Two sequences that decode, and seven new tokens of a third."""
    full, sliding = ([np.arange(first, first + 6)[::-1] for first in starts] for starts in ((1, 7, 13), (21, 27, 33)))
    return StepLayout.of([9, 2, 11], [1, 1, 7], (full, sliding), BLOCK)


@pytest.mark.parametrize(("group", "window"), [(0, None), (1, WINDOW)])
def test_backends_read_the_same_slots_for_every_token(group: int, window: int | None) -> None:
    step = layout()
    seen = []
    for table, start, count in zip(step.block_tables[group], step.starts, step.counts, strict=True):
        for position in range(start, start + count):
            first = 0 if window is None else max(0, position - window + 1)
            seen.append([int(table[p // BLOCK]) * BLOCK + p % BLOCK for p in range(first, position + 1)])
    own = [slots[-1] for slots in seen]

    cpu = cpu_metadata.attention_metadata(step, group, window)
    spans = zip(cpu.base.tolist(), cpu.first.tolist(), cpu.last.tolist(), strict=True)
    assert [cpu.slots[base + first : base + last + 1].tolist() for base, first, last in spans] == seen
    assert cpu.slot_mapping.tolist() == own

    plain = reference.attention_metadata(step, group, window, torch.float32, CPU)
    assert plain.decode is not None and plain.num_decodes == 2 and len(plain.prefills) == 1
    visible = (plain.decode.bias[:, 0, 0] == 0).tolist()
    decoded = plain.decode.slots.view(2, -1).tolist()
    prefill = plain.prefills[0]
    found = [[s for s, v in zip(*row, strict=True) if v] for row in zip(decoded, visible, strict=True)]
    for position in range(prefill.first_position, prefill.first_position + prefill.num_tokens):
        first = 0 if window is None else max(0, position - window + 1)
        found.append(prefill.slots[first - prefill.first_key : position + 1 - prefill.first_key].tolist())
    assert found == seen and plain.slot_mapping.tolist() == own

    triton = triton_metadata.attention_metadata(step, group, CPU)
    assert triton.slot_mapping.tolist() == own and triton.num_decodes == 2
    assert triton.length.tolist() == [10, 3, 18] and triton.query_start.tolist() == [0, 1, 2, 9]
    assert triton.block_table.tolist() == [table.tolist() for table in step.block_tables[group]]
    assert (triton.tile_seq.tolist(), triton.tile_first.tolist()) == ([2], [2])


def test_the_argument_types_are_those_of_the_sources() -> None:
    sources = "".join(path.read_text() for path in (native.SOURCE, *native.HEADERS))
    declared = re.findall(r'extern "C" void (\w+)\(([^)]*)\)', sources)
    assert {name for name, _ in declared} == set(native.ARGUMENT_TYPES)
    kinds = {"int64_t": native.INDEX, "float": native.REAL, "int": native.FLAG, "Layout": native.INDEX}
    for name, arguments in declared:
        types = [
            argument.rsplit(" ", 1)[0].strip() for argument in re.sub(r"\s+", " ", arguments).split(",") if argument
        ]
        expected = [native.TENSOR if "*" in kind else kinds[kind] for kind in types]
        assert native.ARGUMENT_TYPES[name] == expected, name
