"""gptoss convert --merge-adapter: the merged model against the adapter at run time, in every layout; what is lost."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gptoss.cli.conversion import gguf_file, safetensors_folder
from gptoss.cli.convert import convert, main
from gptoss.cli.remote.errors import UsageError
from gptoss.engine.model.model_config import ModelConfig
from gptoss.engine.model.named_sizes import Size, hf_config
from gptoss.kernels.mxfp4 import Mxfp4Tensor, dequantize_mxfp4, quantize_mxfp4
from tests.engine.test_lora import logits_of, lora_model
from tests.support.adapters import ATTENTION, DOWN, GATE_UP, ROUTER, save_adapter, write_adapter
from tests.support.gguf_files import make_small, read_tensors, write_gguf
from tests.support.helpers import assert_close, checkpoint, load_model, relative_rms

EXPERTS: dict[str, Any] = {"target_modules": [], "target_parameters": [GATE_UP, DOWN]}
ALL: dict[str, Any] = {"target_modules": ATTENTION, "target_parameters": [ROUTER, GATE_UP, DOWN]}
TINY = Size(layers=2, hidden=64, intermediate=32, experts=4, heads=4, kv_heads=2)
Tensors = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def without_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes seconds, and has nothing to do with adapters."""
    monkeypatch.setattr(gguf_file, "_add_vocabulary", lambda writer, model: None)
    monkeypatch.setattr(safetensors_folder, "_write_tokenizer", lambda model, out: None)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_small(tmp_path_factory.mktemp("packed") / "model", TINY)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_small(tmp_path_factory.mktemp("dense") / "model", TINY, packed=False)


def merged(source: Path, out: Path, adapter: Path, *options: str) -> Path:
    assert main([str(source), str(out), "--merge-adapter", str(adapter), *options]) == 0
    return out


def matrices(folder: Path) -> Tensors:
    """The adaptable matrices in float32, [N, K] or [E, N, K], by name in Hugging Face's layout."""
    found: Tensors = {}
    tensors = read_tensors(folder)
    for name, value in tensors.items():
        if name.endswith("_blocks"):
            stem = name.removesuffix("_blocks")
            found[stem] = dequantize_mxfp4(Mxfp4Tensor(value, tensors[f"{stem}_scales"]), torch.float32)
        elif name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            found[name] = value.float().transpose(1, 2)
        elif "_proj.weight" in name or "router.weight" in name:
            found[name] = value.float()
    return found


def deltas(adapter: Path, num_experts: int, scales: dict[str, float], default: float) -> Tensors:
    """What an adapter that write_adapter wrote adds, in float64, by PEFT's formulas."""
    tensors = {name: value.double() for name, value in read_tensors(adapter).items()}
    targets = json.loads((adapter / "adapter_config.json").read_text())["target_parameters"] or []
    found: Tensors = {}
    for name, a in tensors.items():
        if ".lora_A." not in name:
            continue
        b = tensors[name.replace(".lora_A.", ".lora_B.")]
        path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        if ".mlp.experts" in path:
            is_first = path.endswith("base_layer") or DOWN not in targets
            layer = path.split(".mlp.experts")[0]
            key = f"{layer}.{GATE_UP if is_first else DOWN}"
            product = torch.einsum("ore,erk->eok", *_by_expert(a, b, num_experts))
        else:
            key, product = f"{path}.weight", b @ a
        found[key] = next((s for part, s in scales.items() if part in key), default) * product
    return found


def _by_expert(a: torch.Tensor, b: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """B [N, r, E] (rank outer) and A [E, r, K] (expert outer)."""
    return b.reshape(len(b), -1, experts), a.reshape(experts, -1, a.shape[1])


def negating_adapter(source: Path, folder: Path) -> Path:
    """An adapter of every kind that negates four columns of each matrix: bfloat16 and MXFP4 hold the sums exactly."""
    generator = torch.Generator().manual_seed(1)
    tensors: Tensors = {}
    for name, w in matrices(source).items():
        columns = torch.randperm(w.shape[-1], generator=generator)[:4]
        a = torch.nn.functional.one_hot(columns, w.shape[-1]).float()
        path = name.removesuffix(".weight").replace(GATE_UP, "mlp.experts.base_layer").replace(DOWN, "mlp.experts")
        stem = f"base_model.model.{path}"
        if w.dim() == 3:
            tensors[f"{stem}.lora_A.weight"] = a.repeat(len(w), 1)
            tensors[f"{stem}.lora_B.weight"] = -w[:, :, columns].permute(1, 2, 0).flatten(1)
        else:
            tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"] = a, -w[:, columns]
    contiguous = {name: value.contiguous() for name, value in tensors.items()}
    return save_adapter(folder, {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "use_rslora": True, **ALL}, contiguous)


@pytest.mark.parametrize("source", ["packed", "dense", pytest.param("nano", marks=pytest.mark.nightly)])
def test_the_logits_are_those_of_the_adapter_at_run_time(
    packed: Path, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str
) -> None:
    base = {"packed": packed, "dense": dense}.get(source) or checkpoint()
    adapter = negating_adapter(base, tmp_path / "adapter")
    out = merged(base, tmp_path / "merged", adapter, *([] if source == "dense" else ["--requantize-experts"]))
    stored_as = "bfloat16" if source == "dense" else "MXFP4"
    assert f"{DOWN} in {stored_as}: relative RMS error 0.00e+00, largest 0.00e+00, 0.000" in capsys.readouterr().out
    ids = random.Random(0).choices(range(ModelConfig.from_folder(base).vocab_size), k=40)
    with_adapter, without = logits_of(lora_model(base, [adapter]), [(ids, 0), (ids, -1)])
    found = logits_of(load_model(out), [(ids, -1)])[0]
    assert_close("merged", with_adapter, found, 1e-5)
    assert relative_rms(without, found) > 0.1


KINDS = {
    "all": ALL,
    "rslora": {**ALL, "use_rslora": True},
    "patterns": {
        "target_modules": ["q_proj"],
        "target_parameters": [GATE_UP, DOWN],
        "alpha_pattern": {"q_proj": 16, "mlp.experts.down_proj": 2},
    },
    "gate_up": {"target_modules": [], "target_parameters": [GATE_UP]},
    "down": {"target_modules": [], "target_parameters": [DOWN]},
}
SCALES = {"patterns": {"q_proj": 4.0, "down_proj": 0.5}}


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_matrix_is_the_rounded_sum(dense: Path, tmp_path: Path, kind: str) -> None:
    model = ModelConfig.from_folder(dense)
    adapter = write_adapter(tmp_path / "adapter", model, **KINDS[kind])
    before, after = read_tensors(dense), read_tensors(merged(dense, tmp_path / "out", adapter))
    default = 8 / math.sqrt(4) if kind == "rslora" else 2.0
    added = deltas(adapter, model.num_experts, SCALES.get(kind, {}), default)
    parameters = KINDS[kind]["target_parameters"]
    assert len(added) == model.num_layers * (len(KINDS[kind]["target_modules"]) + len(parameters))
    for name, value in before.items():
        if name not in added:
            assert torch.equal(after[name], value), name
            continue
        change = added[name].transpose(1, 2) if value.dim() == 3 else added[name]
        exact = value.double() + change
        assert after[name].dtype == torch.bfloat16
        assert ((after[name].double() - exact).abs() <= exact.abs() / 256 + 1e-7).all(), name
        assert (after[name] == exact.float().bfloat16()).double().mean() > 0.999, name


def test_experts_in_mxfp4_are_requantised_only_when_asked_for(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ModelConfig.from_folder(packed)
    adapter = write_adapter(tmp_path / "adapter", model, scale=0.3, **EXPERTS)
    out = tmp_path / "new" / "out"
    with pytest.raises(UsageError, match=rf"adapts {GATE_UP} and {DOWN}, which .* in MXFP4.*--requantize-experts"):
        merged(packed, out, adapter)
    with pytest.raises(UsageError, match="only with --merge-adapter"):
        main([str(packed), str(out), "--requantize-experts"])
    assert not out.parent.exists()

    found = convert(str(packed), out, "hf", adapter=adapter, requantize_experts=True)
    assert found.merge is not None
    before, after, added = matrices(packed), matrices(out), deltas(adapter, model.num_experts, {}, 2.0)
    for kind in (GATE_UP, DOWN):
        exact = torch.stack([before[n] + added[n] for n in before if n.endswith(kind)])
        stored = torch.stack([after[n] for n in before if n.endswith(kind)]).double()
        change = torch.stack([added[n] for n in before if n.endswith(kind)])
        error = found.merge.errors[kind]
        assert error.stored_as == "MXFP4"
        assert error.relative_rms == pytest.approx(float((stored - exact).norm() / exact.norm()), rel=1e-4)
        assert error.of_change == pytest.approx(float((stored - exact).norm() / change.norm()), rel=1e-4)
        assert error.largest == pytest.approx(float((stored - exact).abs().max()), rel=1e-4)
        assert 0.01 < error.relative_rms < 0.2

    merged(packed, tmp_path / "again", adapter, "--requantize-experts")
    error = found.merge.errors[DOWN]
    assert (
        f"{DOWN} in MXFP4: relative RMS error {error.relative_rms:.2e}, largest {error.largest:.2e}, "
        f"{error.of_change:.3f} of what the adapter adds"
    ) in capsys.readouterr().out


def test_an_adapter_of_the_attention_leaves_the_experts_bits(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = write_adapter(tmp_path / "adapter", ModelConfig.from_folder(packed), scale=0.001)
    after = read_tensors(merged(packed, tmp_path / "out", adapter))
    assert all(torch.equal(after[n], t) for n, t in read_tensors(packed).items() if "self_attn" not in n)
    report = capsys.readouterr().out
    assert "experts kept their bits" in report
    assert "self_attn.o_proj in bfloat16: relative RMS error" in report
    assert "rounding lost much of what the adapter adds" in report  # 4e-6 is below bfloat16's step at 0.1


@pytest.mark.parametrize("experts", ["mxfp4", "bfloat16"])
def test_every_layout_holds_the_same_merged_model(packed: Path, dense: Path, tmp_path: Path, experts: str) -> None:
    source, option = (packed, "--requantize-experts") if experts == "mxfp4" else (dense, "--quantize-experts")
    adapter = write_adapter(tmp_path / "adapter", ModelConfig.from_folder(source), **ALL)
    expected = read_tensors(merged(source, tmp_path / "hf", adapter, option))
    for name, more in (("a.gguf", ()), ("original", ("--to", "original"))):
        file = merged(source, tmp_path / name, adapter, option, *more)
        assert main([str(file), str(tmp_path / f"{name}-hf")]) == 0
        assert_same(read_tensors(tmp_path / f"{name}-hf"), expected)
        if experts == "mxfp4":
            assert main([str(source), str(tmp_path / f"plain-{name}"), *more]) == 0
            again = merged(tmp_path / f"plain-{name}", tmp_path / f"{name}-again", adapter, option, "--to", "hf")
            assert_same(read_tensors(again), expected)


def assert_same(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def test_bfloat16_experts_are_quantised_after_the_sum(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ModelConfig.from_folder(dense)
    adapter = write_adapter(tmp_path / "adapter", model, **EXPERTS)
    after = read_tensors(merged(dense, tmp_path / "out", adapter, "--quantize-experts"))
    name = f"model.layers.1.{DOWN}"
    exact = matrices(dense)[name] + deltas(adapter, model.num_experts, {}, 2.0)[name]
    wanted = quantize_mxfp4(exact.float().contiguous())
    assert (after[f"{name}_blocks"] == wanted.blocks).double().mean() > 0.999
    report = capsys.readouterr().out
    assert f"{DOWN} in MXFP4: relative RMS error 1." in report
    assert "experts were quantised to MXFP4, with a relative RMS error of 0.1" in report


def test_what_a_quantised_file_has_lost_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_small(tmp_path / "source")
    file = write_gguf(source, tmp_path / "q.gguf", type_of=lambda name: "Q8_0" if "attn_q.weight" in name else "F32")
    adapter = write_adapter(tmp_path / "adapter", ModelConfig.from_folder(source))
    merged(file, tmp_path / "out", adapter)
    assert "dense tensors were dequantised to bfloat16 (2 in Q8_0); what their quantisation lost" in (
        capsys.readouterr().out
    )


def wrong_adapters(folder: Path, model: ModelConfig) -> Iterator[tuple[Path, str]]:
    wide = Size(layers=2, hidden=128, intermediate=32, experts=4, heads=4, kv_heads=2)
    other = write_adapter(folder / "other", ModelConfig.from_json(hf_config(wide)))
    yield other, r"tensor .*\.self_attn\.._proj\.lora_A\.weight' has shape"
    dora = write_adapter(folder / "dora", model, use_dora=True)
    yield dora, "use_dora is true"
    yield folder / "none", r"none/adapter_config\.json is missing"
    infinite = write_adapter(folder / "infinite", model, scale=1e25)
    yield infinite, r"adds to 'model\.layers\.0\.self_attn.*' is not finite"


def test_wrong_adapters_are_refused_by_name_and_leave_nothing(packed: Path, tmp_path: Path) -> None:
    for adapter, message in wrong_adapters(tmp_path / "adapters", ModelConfig.from_folder(packed)):
        with pytest.raises(UsageError, match=message) as caught:
            merged(packed, tmp_path / "out", adapter)
        assert str(caught.value).startswith(f"--merge-adapter {adapter}: ")
        assert [path.name for path in tmp_path.iterdir()] == ["adapters"]
