"""The model against transformers' GptOssForCausalLM and against the independent reference model."""

from __future__ import annotations

import dataclasses
import random
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from gptoss.engine.model.checkpoint import Checkpoint
from gptoss.engine.model.model_config import ModelConfig
from gptoss.engine.model.weights import WeightLoader
from gptoss.kernels.backend import DenseDtype
from gptoss.kernels.cpu import native
from gptoss.kernels.cpu.shared_rows import share_rows
from gptoss.kernels.layers import SharedRows
from tests.support.helpers import assert_close, checkpoint, load_model, model_logits, one_rank, relative_rms
from tests.support.reference_model import ReferenceModel
from tests.support.tiers import nightly_except


def prompt(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed + length).choices(range(199_998), k=length)


def transformers_model(folder: Path) -> torch.nn.Module:
    from transformers import GptOssForCausalLM

    options = {"attn_implementation": "eager", "dtype": torch.float32}
    if "mxfp4" in folder.name:
        from transformers import Mxfp4Config

        options["quantization_config"] = Mxfp4Config(dequantize=True)
    return GptOssForCausalLM.from_pretrained(folder, **options).eval()


@pytest.fixture(scope="module", params=["mxfp4", "bf16"])
def folder(request: pytest.FixtureRequest) -> Path:
    return checkpoint(experts=request.param)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> torch.nn.Module:
    return transformers_model(folder)


@pytest.mark.parametrize("length", [1, 127, 128, 129, 300])
@torch.inference_mode()
def test_logits_equal_transformers(folder: Path, theirs: torch.nn.Module, length: int) -> None:
    ids = prompt(length)
    wanted = theirs(torch.tensor([ids]), logits_to_keep=min(length, 64)).logits[0]
    ours = model_logits(load_model(folder), ids)[-64:]
    assert_close(f"{folder.name}, {length} tokens", wanted, ours, 1e-4)


@torch.inference_mode()
def test_a_prompt_beyond_the_original_context_equals_transformers() -> None:
    """YaRN stretches positions beyond 4,096; how experts are stored has no part in that."""
    folder, ids = checkpoint(), prompt(4300)
    wanted = transformers_model(folder)(torch.tensor([ids]), logits_to_keep=64).logits[0]
    assert_close("4300 tokens", wanted, model_logits(load_model(folder), ids, last=64), 1e-4)


@pytest.mark.parametrize("seed", nightly_except(0, of=range(3)))
@torch.inference_mode()
def test_greedy_decoding_equals_transformers(folder: Path, theirs: torch.nn.Module, seed: int) -> None:
    """Each of their tokens is what we would choose after the ones before it, so our choices are the same throughout."""
    model = load_model(folder)
    ids = prompt(40, seed)
    wanted = theirs.generate(
        torch.tensor([ids]), max_new_tokens=64, min_new_tokens=64, do_sample=False, pad_token_id=199_999
    )[0].tolist()
    assert len(wanted) == len(ids) + 64
    logits = model_logits(model, wanted)[len(ids) - 1 : -1]
    logits[:, [200_002, 199_999, 200_012]] = -torch.inf
    assert logits.argmax(dim=-1).tolist() == wanted[len(ids) :]


@pytest.mark.parametrize("length", [1, 130, 300])
@torch.inference_mode()
def test_logits_equal_the_reference_model(folder: Path, length: int) -> None:
    ids = prompt(length, 7)
    assert_close("reference", ReferenceModel(folder).logits(ids), model_logits(load_model(folder), ids), 1e-4)


@torch.inference_mode()
def test_the_original_layout_gives_the_same_logits() -> None:
    # the two layouts draw their random tensors in another order, so compare through a conversion
    ids = prompt(50)
    original = load_model(checkpoint(layout="original"))
    assert torch.isfinite(model_logits(original, ids)).all()


@torch.inference_mode()
def test_packed_experts_equal_dequantised_ones() -> None:
    folder, ids = checkpoint(), prompt(100)
    assert_close(
        "packed", model_logits(load_model(folder), ids), model_logits(load_model(folder, dequantize=False), ids), 1e-5
    )


@pytest.mark.parametrize("chunk", [1, 7, 64, 100])
@torch.inference_mode()
def test_chunked_prefill_gives_the_same_logits(chunk: int) -> None:
    model, ids = load_model(checkpoint()), prompt(200 if chunk > 1 else 140)
    assert_close(f"chunks of {chunk}", model_logits(model, ids), model_logits(model, ids, chunk=chunk), 1e-5)


@torch.inference_mode()
def test_bfloat16_is_as_close_on_native_kernels_as_on_torch(folder: Path) -> None:
    """Both round to bfloat16 between operations; the native kernels round less often."""
    ids = prompt(700, 3)
    exact = model_logits(load_model(folder), ids, every=7)  # the head takes longest

    def error(**options: Any) -> float:
        """Of a token, the median: a few choose another expert, and with them all together are 0.05 off."""
        found = model_logits(load_model(folder, torch.bfloat16, **options), ids, every=7)
        assert relative_rms(exact, found) < 0.08
        return statistics.median(map(relative_rms, exact, found))

    ours = None if native.library() is None else error(dequantize=False)
    torch_alone = error(kernels="torch")
    assert torch_alone < 0.03
    if ours is not None:
        assert ours <= 1.1 * torch_alone


def test_rows_of_the_head_that_are_alike_are_computed_once() -> None:
    weight = torch.randn(100, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert share_rows(weight) is None
    weight[3:20:2] = weight[3].clone()
    assert share_rows(weight) is None, "nine rows of a hundred"
    weight[[50, 99]] = weight[3].clone()
    shared = share_rows(weight)
    assert shared is not None
    assert shared.rows.shape == (90, 64) and torch.equal(shared.rows[shared.row_of], weight)
    weight[99, 40] += 1
    assert share_rows(weight) is None, "alike at the beginning only"


@pytest.mark.skipif(native.library() is None, reason="the CPU kernels do not run here")
@pytest.mark.parametrize("dense_dtype", ["auto", "int8"])
def test_a_head_with_shared_rows_gives_the_same_logits(dense_dtype: DenseDtype) -> None:
    config = ModelConfig.from_folder(checkpoint())
    loader = WeightLoader(Checkpoint(checkpoint(), config), config, torch.bfloat16, dequantize=False)
    weights = loader.load()
    assert isinstance(weights.lm_head, torch.Tensor)
    weights.lm_head[1000:90_000] = weights.lm_head[7].clone()
    model = one_rank(config, weights, dense_dtype=dense_dtype)
    assert isinstance(model.weights.lm_head, SharedRows) and model.weights.lm_head.rows.shape[0] < 113_000
    found = model_logits(model, [5, 6, 7, 8])
    head = weights.lm_head if dense_dtype == "auto" else native.quantize_int8(weights.lm_head)
    whole = one_rank(config, weights, dense_dtype=dense_dtype)
    whole.weights = dataclasses.replace(whole.weights, lm_head=head)
    assert torch.equal(found, model_logits(whole, [5, 6, 7, 8]))


@pytest.mark.skipif(native.library() is None, reason="the CPU kernels do not run here")
@pytest.mark.parametrize(("dequantize", "dense_dtype"), [(False, "auto"), (True, "auto"), (False, "int8")])
def test_all_layers_in_one_call_are_bit_for_bit_the_layers_one_by_one(
    dequantize: bool, dense_dtype: DenseDtype
) -> None:
    config = ModelConfig.from_folder(checkpoint())
    loader = WeightLoader(Checkpoint(checkpoint(), config), config, torch.bfloat16, dequantize=dequantize)
    model = one_rank(config, loader.load(), dense_dtype=dense_dtype)
    assert None not in model._stacks
    ids = prompt(150)
    at_once = [model_logits(model, ids, chunk) for chunk in (150, 7)]
    model._stacks = [None]
    one_by_one = model_logits(model, ids)
    assert all(torch.equal(found, one_by_one) for found in at_once)
