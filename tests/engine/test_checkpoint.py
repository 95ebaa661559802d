"""Broken checkpoints are errors that name file and tensor before anything is served."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptoss.cli.make_checkpoint import make_checkpoint
from gptoss.config.errors import ConfigError
from gptoss.engine.model.checkpoint import Checkpoint
from gptoss.engine.model.model_config import ModelConfig
from gptoss.engine.model.named_sizes import SIZES, Size, hf_config
from gptoss.engine.model.tensor_source import CheckpointError
from gptoss.engine.model.weights import WeightLoader, dummy_weights, iterate_tensors
from tests.support.helpers import checkpoint, model_logits, one_rank

TINY = Size(layers=2, hidden=64, intermediate=64, experts=4, heads=2, kv_heads=1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(TINY, tmp_path_factory.mktemp("tiny") / "model", tokenizer=False)


@pytest.fixture
def broken(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "broken"))


def load(folder: Path) -> list[torch.Tensor]:
    config = ModelConfig.from_folder(folder)
    loader = WeightLoader(Checkpoint(folder, config), config, torch.float32, dequantize=True)
    return list(iterate_tensors(loader.load()))


def edit(folder: Path, change: object) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)  # type: ignore[operator]
    save_file(tensors, path)


def test_a_whole_checkpoint_loads(tiny: Path) -> None:
    assert all(torch.isfinite(t).all() for t in load(tiny))


def test_a_missing_tensor_is_named(broken: Path) -> None:
    edit(broken, lambda t: t.pop("model.layers.1.self_attn.sinks"))
    with pytest.raises(CheckpointError, match=r"'model\.layers\.1\.self_attn\.sinks' is missing"):
        load(broken)


def test_an_extra_tensor_is_named(broken: Path) -> None:
    edit(broken, lambda t: t.update(surprise=torch.zeros(1)))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: unexpected tensor 'surprise'"):
        load(broken)


def test_a_wrong_shape_is_named(broken: Path) -> None:
    edit(broken, lambda t: t.update({"model.norm.weight": torch.zeros(63)}))
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' has shape \(63,\), expected \(64,\)"):
        load(broken)


def test_a_wrong_type_is_named(broken: Path) -> None:
    edit(broken, lambda t: t.update({"model.norm.weight": torch.zeros(64, dtype=torch.int32)}))
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' has type I32"):
        load(broken)


def test_a_truncated_file_is_named(broken: Path) -> None:
    path = broken / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated or damaged"):
        load(broken)


def test_a_missing_shard_is_named(broken: Path) -> None:
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model-00001-of-00002\.safetensors is missing"):
        load(broken)


def test_a_folder_without_weights_is_an_error(broken: Path) -> None:
    (broken / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds no \*\.safetensors"):
        load(broken)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "must hold an object"),
        ("null", "must hold an object"),
        ('{"model_type": "llama"}', "'llama'"),
        ('{"model_type": "gpt_oss"}', "lacks"),
        (
            '{"model_type": "gpt_oss_puzzle", "num_hidden_layers": 1, "block_configs": [{}]}',
            r"block_configs\[0\] lacks",
        ),
    ],
)
def test_a_bad_config_is_an_error(broken: Path, text: str, message: str) -> None:
    (broken / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load(broken)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_hidden_layers", "2", "num_hidden_layers is '2', expected a positive whole number"),
        ("num_hidden_layers", 2.0, "num_hidden_layers is 2.0"),
        ("hidden_size", None, "hidden_size is None"),
        ("sliding_window", -1, "sliding_window is -1"),
        ("num_experts_per_tok", 99, "num_experts_per_tok is 99, above num_local_experts"),
        ("layer_types", ["x", "full_attention"], r"layer_types\[0\] is 'x'"),
        ("layer_types", ["full_attention"], "an entry for each of the 2 layers"),
        ("rope_theta", "x", "rope_theta is 'x'"),
        ("rope_scaling", "x", "rope_scaling is 'x', expected an object"),
        ("rope_parameters", [1], r"rope_parameters is \[1\], expected an object"),
        ("rope_scaling", {"factor": float("inf")}, "factor is inf"),
        ("rms_norm_eps", None, "rms_norm_eps is None"),
    ],
)
def test_a_value_that_no_model_has_is_named(broken: Path, key: str, value: object, message: str) -> None:
    path = broken / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ConfigError, match=message):
        load(broken)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}'])
def test_a_damaged_index_is_an_error(broken: Path, text: str) -> None:
    (broken / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        load(broken)


def test_shards_and_single_files_hold_the_same(tiny: Path, tmp_path: Path) -> None:
    tensors = load_file(tiny / "model.safetensors")
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({n: tensors[n] for n in part}, tmp_path / file)
    weight_map = {n: file for file, part in halves.items() for n in part}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    shutil.copy(tiny / "config.json", tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(load(tiny), load(tmp_path), strict=True))


@torch.inference_mode()
def test_both_layouts_of_the_same_weights_give_the_same_logits(tiny: Path, tmp_path: Path) -> None:
    """Renames the Hugging Face tensors to the original layout's names and joins Q, K and V."""
    source = load_file(tiny / "model.safetensors")
    out = {
        "embedding.weight": source["model.embed_tokens.weight"],
        "unembedding.weight": source["lm_head.weight"],
        "norm.scale": source["model.norm.weight"],
    }
    for n in range(TINY.layers):
        hf, block = f"model.layers.{n}.", f"block.{n}."
        a, m = hf + "self_attn.", hf + "mlp."
        for kind in ("weight", "bias"):
            out[f"{block}attn.qkv.{kind}"] = torch.cat([source[f"{a}{x}_proj.{kind}"] for x in "qkv"])
            out[f"{block}attn.out.{kind}"] = source[f"{a}o_proj.{kind}"]
            out[f"{block}mlp.gate.{kind}"] = source[f"{m}router.{kind}"]
        out[block + "attn.sinks"] = source[a + "sinks"]
        out[block + "attn.norm.scale"] = source[hf + "input_layernorm.weight"]
        out[block + "mlp.norm.scale"] = source[hf + "post_attention_layernorm.weight"]
        for new, old in (("mlp1", "gate_up_proj"), ("mlp2", "down_proj")):
            out[f"{block}mlp.{new}_bias"] = source[f"{m}experts.{old}_bias"]
            for part in ("blocks", "scales"):
                out[f"{block}mlp.{new}_weight.{part}"] = source[f"{m}experts.{old}_{part}"]
    original = make_checkpoint(TINY, tmp_path / "original", layout="original", tokenizer=False)
    save_file(out, original / "model.safetensors")
    ids = list(range(5, 200))
    logits = []
    for folder in (tiny, original):
        config = ModelConfig.from_folder(folder)
        weights = WeightLoader(Checkpoint(folder, config), config, torch.float32, dequantize=True).load()
        logits.append(model_logits(one_rank(config, weights), ids))
    assert torch.equal(logits[0], logits[1])


def test_the_same_seed_gives_the_same_bytes(tiny: Path, tmp_path: Path) -> None:
    again = make_checkpoint(TINY, tmp_path / "again", tokenizer=False)
    assert (again / "model.safetensors").read_bytes() == (tiny / "model.safetensors").read_bytes()
    other = make_checkpoint(TINY, tmp_path / "other", seed=1, tokenizer=False)
    assert (other / "model.safetensors").read_bytes() != (tiny / "model.safetensors").read_bytes()


def test_tensor_names_and_bytes_are_those_of_the_published_20b() -> None:
    """459 tensors and 13,761,264,768 bytes stand in the index of openai/gpt-oss-20b."""
    from gptoss.engine.model.checkpoint import expected_tensors

    config = ModelConfig.from_json(hf_config(SIZES["20b"]))
    expected = expected_tensors(config, original=False, packed=True)
    assert len(expected) == 459
    width = {True: 1, False: 2}
    total = sum(width["U8" in types] * torch.Size(shape).numel() for shape, types in expected.values())
    assert total == 13_761_264_768


def test_dummy_weights_have_the_true_sizes() -> None:
    config = ModelConfig.from_json(hf_config(TINY))
    weights = dummy_weights(config, torch.bfloat16, torch.device("cpu"), 0)
    logits = model_logits(one_rank(config, weights), [1, 2, 3])
    assert torch.isfinite(logits).all()
    assert sum(t.nbytes for t in iterate_tensors(weights)) > 2 * 2 * config.vocab_size * config.hidden_size


def test_loading_needs_little_more_than_the_model() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    folder = checkpoint("nano")
    config = ModelConfig.from_folder(folder)
    loader = WeightLoader(Checkpoint(folder, config), config, torch.bfloat16, dequantize=True)
    weights = loader.load()
    size = sum(t.nbytes for t in iterate_tensors(weights)) // 1024
    largest = config.vocab_size * config.hidden_size * 2 // 1024
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    # the memory-mapped file counts as resident once read, so the file's own size may come on top
    file_size = sum(p.stat().st_size for p in folder.glob("*.safetensors")) // 1024
    assert grown <= size + largest + file_size + 50_000
