"""What of a PEFT adapter is refused, and by which name; and from where adapters are loaded."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptoss.config.errors import ConfigError
from gptoss.engine.client.adapters import AdapterNotFoundError, Adapters, folder_below
from gptoss.engine.config import EngineConfig
from gptoss.engine.model.lora import load_adapter
from gptoss.engine.model.lora_file import AdapterError, read_adapter
from gptoss.engine.model.model_config import ModelConfig
from gptoss.engine.model.named_sizes import Size, hf_config
from gptoss.engine.parallel.shards import whole
from tests.support.adapters import DOWN, GATE_UP, ROUTER, write_adapter

MODEL = ModelConfig.from_json(hf_config(Size(layers=2, hidden=64, intermediate=32, experts=4, heads=4, kv_heads=2)))
EXPERTS: dict[str, Any] = {"target_modules": [], "target_parameters": [GATE_UP, DOWN]}
PREFIX = "base_model.model.model.layers"


def changed(folder: Path, **config: Any) -> Path:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return folder


def with_tensors(folder: Path, changes: dict[str, torch.Tensor | None]) -> Path:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file) | {name: tensor for name, tensor in changes.items() if tensor is not None}
    save_file({n: t for n, t in tensors.items() if n not in changes or changes[n] is not None}, file)
    return folder


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"use_dora": True}, "use_dora is true"),
        ({"bias": "lora_only"}, 'bias is "lora_only"'),
        ({"lora_bias": True}, "lora_bias is true"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices is"),
        ({"layer_replication": [[0, 1]]}, "layer_replication is"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens is"),
        ({"init_lora_weights": "pissa"}, 'init_lora_weights is "pissa"'),
        ({"lora_dropout": 0.1, "target_parameters": [ROUTER]}, "lora_dropout must be 0"),
        ({"r": 0}, "r must be a whole number above 0, got 0"),
        ({"r": 5}, r"k_proj.lora_A.weight' has shape \(4, 64\), expected \(5, 64\) for rank 5"),
        ({"lora_alpha": "x"}, "lora_alpha must be a number"),
        ({"rank_pattern": {"(": 2}}, r"\( is not a valid regular expression"),
        ({"rank_pattern": {"q_proj": 3}}, "q_proj.lora_A.weight' has shape"),
        ({"rank_pattern": [2]}, "rank_pattern must be an object"),
        ({"target_modules": 3}, "target_modules must be a list"),
        ({"target_modules": ["q_proj"], "target_parameters": [ROUTER]}, "layers.0.mlp.router.weight' are missing"),
    ],
)
def test_a_configuration_is_refused_by_the_name_of_its_key(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    folder = changed(write_adapter(tmp_path, MODEL), **config)
    with pytest.raises(AdapterError, match=message):
        read_adapter(folder, MODEL)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (f"{PREFIX}.0.self_attn.q_proj.lora_A.weight", None, "q_proj.lora_A.weight' is missing"),
        (f"{PREFIX}.1.self_attn.q_proj.lora_B.weight", torch.ones(4, 4), r"has shape \(4, 4\), expected \(256, 4\)"),
        (f"{PREFIX}.2.self_attn.q_proj.lora_A.weight", torch.ones(4, 64), "for layer 2, but the model has 2 layers"),
        (f"{PREFIX}.0.self_attn.sinks.lora_A.weight", torch.ones(4, 64), "sinks.lora_B.weight' is missing"),
        ("base_model.model.lm_head.lora_A.weight", torch.ones(4, 64), "'base_model.model.lm_head.lora_A.weight'"),
        (f"{PREFIX}.0.self_attn.q_proj.lora_magnitude_vector", torch.ones(64), "lora_magnitude_vector"),
        (f"{PREFIX}.0.self_attn.q_proj.lora_A.weight", torch.ones(4, 64).int(), "has type I32"),
        (f"{PREFIX}.0.self_attn.q_proj.lora_A.default.weight", torch.ones(4, 64), "is there twice"),
    ],
)
def test_a_tensor_is_refused_by_its_name(tmp_path: Path, name: str, tensor: torch.Tensor | None, message: str) -> None:
    folder = with_tensors(write_adapter(tmp_path, MODEL), {name: tensor})
    with pytest.raises(AdapterError, match=message):
        read_adapter(folder, MODEL)


def test_an_adapter_of_other_experts_or_fewer_layers_is_refused(tmp_path: Path) -> None:
    shallow = ModelConfig.from_json(
        hf_config(Size(layers=1, hidden=64, intermediate=32, experts=4, heads=4, kv_heads=2))
    )
    with pytest.raises(AdapterError, match=r"layers\.1\.self_attn\.q_proj' are missing"):
        read_adapter(write_adapter(tmp_path / "shallow", shallow), MODEL)
    more = ModelConfig.from_json(hf_config(Size(layers=2, hidden=64, intermediate=32, experts=8, heads=4, kv_heads=2)))
    folder = write_adapter(tmp_path / "more", more, **EXPERTS)
    with pytest.raises(
        AdapterError, match=r"experts\.base_layer\.lora_A\.weight' has shape \(32, 64\), expected \(16, 64\)"
    ):
        read_adapter(folder, MODEL)
    swapped = write_adapter(tmp_path / "swapped", MODEL, target_modules=[], target_parameters=[DOWN])
    changed(swapped, target_parameters=[GATE_UP])
    with pytest.raises(AdapterError, match="adapts down_proj, which target_parameters does not list"):
        read_adapter(swapped, MODEL)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", MODEL)
    data = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(data[:1000])
    with pytest.raises(AdapterError, match="truncated or damaged"):
        read_adapter(folder, MODEL)
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").touch()
    with pytest.raises(AdapterError, match=r"is missing: adapter_model\.bin is a pickle"):
        read_adapter(folder, MODEL)
    (folder / "adapter_config.json").write_text("[" * 100_000)
    with pytest.raises(AdapterError, match="is not valid JSON"):
        read_adapter(folder, MODEL)
    with pytest.raises(AdapterError, match=r"adapter_config\.json is missing"):
        read_adapter(tmp_path, MODEL)
    infinite = write_adapter(tmp_path / "inf", MODEL)
    with_tensors(infinite, {f"{PREFIX}.0.self_attn.q_proj.lora_A.weight": torch.full((4, 64), torch.inf)})
    with pytest.raises(AdapterError, match=r"q_proj\.lora_A\.weight' holds values that are not finite"):
        load_adapter(read_adapter(infinite, MODEL), MODEL, whole(MODEL), torch.float32, torch.device("cpu"))


def test_experts_as_modules_are_those_of_the_stacked_form(tmp_path: Path) -> None:
    stacked = write_adapter(tmp_path / "stacked", MODEL, **EXPERTS)
    tensors, split = load_file(stacked / "adapter_model.safetensors"), {}
    for layer in range(2):
        for path, name in (("experts.base_layer", "gate_up"), ("experts", "down")):
            a, b = (tensors[f"{PREFIX}.{layer}.mlp.{path}.lora_{x}.weight"] for x in "AB")
            for e in range(4):
                module = f"{PREFIX}.{layer}.mlp.experts.{name}_projs.{e}"
                split[f"{module}.lora_A.weight"] = a.view(4, 4, -1)[e].clone()
                split[f"{module}.lora_B.weight"] = b.view(len(b), 4, 4)[:, :, e].clone()
    folder = write_adapter(tmp_path / "modules", MODEL, target_modules=[])
    save_file(split, folder / "adapter_model.safetensors")
    cpu = torch.device("cpu")
    one, other = (
        load_adapter(read_adapter(f, MODEL), MODEL, whole(MODEL), torch.float32, cpu) for f in (stacked, folder)
    )
    for left, right in zip(one, other, strict=True):
        assert left.w1 is not None and right.w1 is not None and left.w2 is not None and right.w2 is not None
        assert torch.equal(left.w1.a, right.w1.a) and torch.equal(left.w1.b, right.w1.b)
        assert torch.equal(left.w2.a, right.w2.a) and torch.equal(left.w2.b, right.w2.b)
    with_tensors(folder, {f"{PREFIX}.0.mlp.experts.down_projs.2.lora_{x}.weight": None for x in "AB"})
    with pytest.raises(AdapterError, match="layer 0 adapts 3 experts"):
        read_adapter(folder, MODEL)


def test_folders_outside_are_refused(tmp_path: Path) -> None:
    root, outside = tmp_path / "adapters", tmp_path / "outside"
    inside = write_adapter(root / "a" / "b", MODEL)
    write_adapter(outside, MODEL)
    (root / "link").symlink_to(outside)
    (root / "files").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (root / "files" / name).symlink_to(outside / name)
    (root / "circle").symlink_to(root / "circle")
    assert folder_below(root, "a/b") == folder_below(root, str(inside)) == inside
    for path in (
        "../outside",
        "a/../../outside",
        str(outside),
        "link",
        "files",
        ".",
        "",
        "/",
        "nothing",
        "a/b\0",
        "circle",
        "a" * 5000,
    ):
        with pytest.raises(AdapterError):
            folder_below(root, path)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path, MODEL)
    (folder / "adapter_config.json").unlink()
    os.mkfifo(folder / "adapter_config.json")
    with pytest.raises(AdapterError, match=r"adapter_config\.json is not a file"):
        read_adapter(folder, MODEL)


def test_names_number_rank_and_bytes_are_limited(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path, MODEL)
    config = EngineConfig(MODEL, None, load_format="dummy", max_loras=2, max_lora_rank=4, lora_dir=tmp_path)
    adapters = Adapters(config, lambda: {"model", "balanced"})
    file = adapters.read(folder)
    for name in ("model", "balanced", "", "a b", "a:balanced", "../a", "x" * 129):
        with pytest.raises(AdapterError):
            adapters.check_name(name)
    first = adapters.add("one", file)
    assert (first.id, adapters.get("one"), adapters.serves(1)) == (1, first, True)
    with pytest.raises(AdapterError, match="'one' is loaded already"):
        adapters.add("one", file)
    assert adapters.end("one").id == 1
    assert not adapters.serves(1) and adapters.held == [first] and adapters.names == []
    adapters.add("one", file)  # while the other is being unloaded
    with pytest.raises(AdapterError, match="2 adapters are loaded already"):
        adapters.add("two", file)
    adapters.forget(1)
    adapters.max_bytes = adapters.num_bytes
    with pytest.raises(AdapterError, match="max_lora_bytes"):
        adapters.add("two", file)
    with pytest.raises(AdapterNotFoundError):
        adapters.end("two")
    with pytest.raises(AdapterError, match="rank 8 is above 4"):
        adapters.read(write_adapter(tmp_path / "8", MODEL, rank=8))
    with pytest.raises(ConfigError, match=r"lora \(--lora x=.*rank 8 is above 4"):
        Adapters.of_config(
            EngineConfig(MODEL, None, load_format="dummy", max_lora_rank=4, lora={"x": tmp_path / "8"}), set
        )
    with pytest.raises(ConfigError, match=r"lora \(--lora\) needs backend 'native'"):
        EngineConfig(MODEL, folder, backend="transformers", lora={"x": folder})


def test_the_bytes_of_the_configured_adapters_are_the_budget(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path, MODEL)
    config = EngineConfig(MODEL, None, load_format="dummy", max_loras=3, max_lora_rank=4, lora={"a": folder})
    adapters = Adapters.of_config(config, set)
    assert (
        adapters.max_bytes
        == adapters.num_bytes
        == 2 * sum(4 * (k + n) * 2 for k, n in ((64, 256), (64, 128), (64, 128), (256, 64)))
    )
