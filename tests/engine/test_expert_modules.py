"""Checkpoints of Unsloth and AMD Quark: the same weights as the stacked form; what is wrong is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gptoss.engine.model.checkpoint import Checkpoint
from gptoss.engine.model.model_config import ModelConfig
from gptoss.engine.model.tensor_source import CheckpointError
from gptoss.engine.model.weights import ModelWeights, WeightLoader, iterate_tensors
from gptoss.engine.parallel.shards import make_shard
from tests.support.gguf_files import make_small, read_tensors

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_small(tmp_path_factory.mktemp("packed") / "model")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_small(tmp_path_factory.mktemp("dense") / "model", packed=False)


def quark(stacked: Tensors) -> Tensors:
    """The tensors of AMD's file, module by module, with the scales of its activations and KV cache."""
    out: Tensors = {"model.layers.0.self_attn.k_proj.output_scale": torch.ones(1)}
    for name, value in stacked.items():
        layer, found, rest = name.partition(".mlp.experts.")
        if not found:
            out[name] = value
            continue
        proj, _, part = rest.rpartition("_")
        for e, one in enumerate(value):
            stem = f"{layer}.mlp.experts.{e}.{proj}"
            match part:
                case "blocks":
                    out[f"{stem}.weight"] = one.flatten(1).clone()
                    out[f"{stem}.input_scale"] = torch.ones(1)
                case "scales":
                    out[f"{stem}.weight_scale"] = one.clone()
                case _:
                    out[f"{stem}.bias"] = one.clone()
    return out


def unsloth(stacked: Tensors) -> Tensors:
    """The tensors of a fine-tune of Unsloth: Linear modules [out, in]."""
    out: Tensors = {}
    for name, value in stacked.items():
        layer, found, rest = name.partition(".mlp.experts.")
        if not found:
            out[name.replace(".mlp.router.", ".mlp.router.linear.")] = value
            continue
        for e, one in enumerate(value):
            stem = f"{layer}.mlp.experts.{rest.removesuffix('_bias')}s.{e}"
            out[f"{stem}.bias" if rest.endswith("_bias") else f"{stem}.weight"] = (
                one.clone() if one.dim() == 1 else one.mT.contiguous()
            )
    return out


def write(source: Path, out: Path, make: Callable[[Tensors], Tensors], edit: Callable[[Tensors], object]) -> Path:
    tensors = make(read_tensors(source))
    edit(tensors)
    out.mkdir()
    (out / "config.json").write_text((source / "config.json").read_text())
    save_file(tensors, out / "model.safetensors")
    return out


def load(folder: Path, rank: int | None = None) -> ModelWeights:
    config = ModelConfig.from_folder(folder)
    shard = None
    if rank is not None:
        shard = make_shard(config, rank, tensor_size=2, stage_layers=[range(2)], expert_parallel=rank == 1)
    return WeightLoader(
        Checkpoint(folder, config), config, torch.bfloat16, dequantize=False, shard=shard
    ).load()  # fmt: skip


@pytest.mark.parametrize("make", [quark, unsloth])
@pytest.mark.parametrize("rank", [None, 0, 1], ids=["whole", "tensor", "expert"])
def test_modules_are_the_same_weights_as_stacked_experts(
    packed: Path, dense: Path, tmp_path: Path, make: Callable[[Tensors], Tensors], rank: int | None
) -> None:
    stacked = packed if make is quark else dense
    found = load(write(stacked, tmp_path / "modules", make, lambda t: None), rank)
    pairs = list(zip(iterate_tensors(found), iterate_tensors(load(stacked, rank)), strict=True))
    assert len(pairs) > 20 and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def test_scales_of_activations_are_left_out_and_the_log_says_so(
    packed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    load(write(packed, tmp_path / "modules", quark, lambda t: None))
    assert "17 scales of activations and of the KV cache are not part of the weights" in caplog.text


E = "model.layers.1.mlp.experts."


@pytest.mark.parametrize(
    ("make", "edit", "message"),
    [
        (quark, lambda t: t.pop(f"{E}3.down_proj.weight_scale"), r"experts\.3\.down_proj\.weight_scale' is missing"),
        (quark, lambda t: t.update({f"{E}4.down_proj.bias": torch.ones(1)}), r"unexpected tensor .*experts\.4\.down"),
        (
            quark,
            lambda t: t.update({f"{E}0.gate_up_proj.weight": torch.zeros(128, 64, dtype=torch.uint8)}),
            r"experts\.0\.gate_up_proj\.weight' has shape \(128, 64\), expected \(128, 128\)",
        ),
        (unsloth, lambda t: t.pop(f"{E}gate_up_projs.2.bias"), r"gate_up_projs\.2\.bias' is missing"),
        (
            unsloth,
            lambda t: t.update({f"{E}down_projs.1.weight": torch.zeros(256, 64, dtype=torch.int8)}),
            r"down_projs\.1\.weight' has type I8, expected BF16 or F16 or F32",
        ),
        (unsloth, lambda t: t.update({f"{E}down_projs.1.weight.absmax": torch.ones(1)}), r"unexpected .*\.absmax'"),
        (
            quark,
            lambda t: t.update(
                {"model.layers.0.self_attn.q_proj.weight": torch.zeros(256, 256).to(torch.float8_e4m3fn)}
            ),
            r"q_proj\.weight' has type F8_E4M3, expected BF16",
        ),
    ],
)
def test_what_is_wrong_is_named(
    packed: Path,
    dense: Path,
    tmp_path: Path,
    make: Callable[[Tensors], Tensors],
    edit: Callable[[Tensors], object],
    message: str,
) -> None:
    folder = write(packed if make is quark else dense, tmp_path / "modules", make, edit)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_a_config_that_does_not_say_how_experts_are_stored_is_reported(
    dense: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write(dense, tmp_path / "modules", unsloth, lambda t: None)
    raw = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}
    (folder / "config.json").write_text(json.dumps(raw))
    load(folder)
    assert "experts are bfloat16, which its config.json does not say" in caplog.text
