"""Which EAGLE-3 heads are read, and by which name others are refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptoss.config.errors import ConfigError
from gptoss.engine.config import EngineConfig
from gptoss.engine.model.draft_head import read_draft_head
from gptoss.engine.model.draft_head_config import DraftHeadError
from gptoss.engine.model.model_config import ModelConfig
from gptoss.engine.model.named_sizes import SIZES, Size, hf_config
from gptoss.engine.parallel.memory_plan import layer_bytes, make_plan
from gptoss.engine.parallel.shards import whole
from tests.support.draft_heads import write_head

SMALL = hf_config(Size(layers=6, hidden=64, intermediate=32, experts=4, heads=4, kv_heads=2)) | {"vocab_size": 600}
MODEL = ModelConfig.from_json(SMALL)
YARN = {"rope_type": "yarn", "factor": 8, "original_max_position_embeddings": 4096}
SLIDING = {"layer_types": ["sliding_attention"]}
WIDE_HEAD = {"lm_head.weight": np.zeros((700, 64), np.float32)}
POSITIONS = "original_max_position_embeddings"
FIRST = "layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize("dialect", ["sglang", "speculators"])
def test_both_dialects_say_the_same(tmp_path: Path, dialect: str) -> None:
    flags = {"norm_before_fc": True, "norm_before_residual": True, "norm_output": True}
    folder = write_head(tmp_path, MODEL, dialect, layer_types=["sliding_attention"], sliding_window=7, **flags)
    head = read_draft_head(folder, MODEL)
    assert head.taps == (1, 3, 5) == head.boundaries(6)
    assert (head.num_heads, head.num_kv_heads, head.head_dim, head.intermediate_size) == (4, 2, 64, 96)
    assert (head.window, head.rms_norm_eps, head.rope.theta) == (7, 1e-5, 10_000.0)
    assert head.norm_before_fc and head.norm_before_residual and head.norm_output and not head.fc_norm
    assert {"layers.0.self_attn.q_proj.weight", "fc.weight", "d2t", "input_norm.weight"} <= head.tensors.keys()
    assert "t2d" not in head.tensors
    assert head.kv_bytes_per_token(2) == 2 * 2 * 64 * 2


def test_what_a_head_does_not_say_is_as_other_servers_take_it(tmp_path: Path) -> None:
    deep = ModelConfig.from_json(hf_config(dataclasses.replace(SIZES["20b"], hidden=64)) | {"vocab_size": 600})
    head = read_draft_head(write_head(tmp_path, deep, taps=None, draft_vocab=None), deep)
    assert head.taps == (2, 12, 21)
    assert head.rope.type == "default" and head.window is None
    assert "lm_head.weight" not in head.tensors, "the model's output head"


def test_a_head_without_taps_takes_the_final_state(tmp_path: Path) -> None:
    head = read_draft_head(write_head(tmp_path, MODEL, taps=()), MODEL)
    assert head.taps == () and head.boundaries(6) == (6,)
    assert "fc.weight" not in head.tensors


def test_a_head_that_names_only_its_layer_is_known_by_its_vocabulary(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False}
    folder = write_head(tmp_path, MODEL, taps=(2, 3, 6), architectures=["LlamaForCausalLM"], rope_scaling=yarn)
    head = read_draft_head(folder, MODEL)
    assert (head.rope.type, head.rope.factor, head.rope.truncate) == ("yarn", 32.0, False)
    write_head(tmp_path, MODEL, architectures=["LlamaForCausalLM"], draft_vocab=None)
    with pytest.raises(DraftHeadError, match=r'architectures is \["LlamaForCausalLM"\], only EAGLE-3 heads'):
        read_draft_head(folder, MODEL)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"num_hidden_layers": 4}, r"config\.json: num_hidden_layers is 4, only heads with 1 are served"),
        ({"architectures": ["DFlashDraftModel"]}, r'architectures is \["DFlashDraftModel"\], only EAGLE-3 heads'),
        ({"architectures": ["GptOssForCausalLMEagle3"]}, "architectures is"),
        ({"speculators_model_type": "peagle"}, "speculators_model_type is \"peagle\", only heads of type 'eagle3'"),
        ({"mask_token_id": 7}, "mask_token_id is 7, which EAGLE-3 heads do not have"),
        ({"dflash_config": {"block_size": 10}}, "dflash_config is"),
        ({"parallel_draft_step": 4}, "parallel_draft_step is 4, only heads with 1"),
        ({"hidden_size": 128}, "hidden_size is 128, but the model's is 64: the head is for another model"),
        ({"target_hidden_size": 2880}, "target_hidden_size is 2880, but the model's is 64"),
        ({"vocab_size": 128256}, "vocab_size is 128256, but the model's is 600"),
        ({"model_type": "qwen3"}, "model_type is \"qwen3\", the layer of a head must be of type 'llama'"),
        ({"hidden_act": "gelu"}, 'hidden_act is "gelu", only heads with "silu"'),
        (
            {"taps": (1, 3, 7)},
            r"eagle_aux_hidden_state_layer_ids is \[1, 3, 7\], expected rising numbers between 0 and 6",
        ),
        ({"taps": (3, 1, 5)}, "expected rising numbers"),
        ({"fc_norm": True, "norm_before_fc": True}, "fc_norm is true, which excludes norm_before_fc"),
        ({"taps": (), "fc_norm": True}, "use_aux_hidden_state is false, so there is no fc"),
        ({"norm_output": 1}, "norm_output is 1, expected true or false"),
        (
            {"rope_scaling": {"rope_type": "longrope"}},
            "rope_scaling.rope_type is .*, only the rope types default, yarn, llama3",
        ),
        ({"rope_theta": 0}, "rope_theta is 0, expected a positive number"),
        ({"num_attention_heads": 3}, r"num_attention_heads is 3, expected a multiple of num_key_value_heads \(2\)"),
        (
            {"draft_vocab_size": 400},
            r"'lm_head.weight' has shape \(500, 64\), expected \(400, 64\) by draft_vocab_size",
        ),
        ({"rms_norm_eps": "x"}, 'rms_norm_eps is "x", expected a positive number'),
        ({"eagle_config": 3}, "eagle_config is 3, expected an object"),
        ({"layer_types": ["chunked_attention"]}, "layer_types is"),
        ({"layer_types": 5}, "layer_types is 5, expected a list of full_attention or sliding_attention"),
        ({"layer_types": "full_attention"}, 'layer_types is "full_attention", expected a list'),
        ({"layer_types": []}, r"layer_types is \[\], expected a list"),
        ({"layer_types": [1, 2]}, r"layer_types is \[1, 2\], expected a list"),
        ({"use_aux_hidden_state": "x"}, 'use_aux_hidden_state is "x", expected true or false'),
        ({"aux_hidden_state_layer_ids": 0, "taps": None}, "aux_hidden_state_layer_ids is 0, expected rising numbers"),
        ({"num_hidden_layers": True}, "num_hidden_layers is true, only heads with 1"),
        ({"hidden_size": 64.0}, "hidden_size is 64.0, but the model's is 64"),
        (
            SLIDING | {"sliding_window": 10**30},
            "sliding_window is 1.*, expected a positive whole number, at most 2147483647",
        ),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps is 1.*, expected a positive number"),
        ({"rms_norm_eps": 1e300}, r"rms_norm_eps is 1e\+300, expected a positive number, 1e-12 to 1e\+12"),
        ({"head_dim": 63}, "head_dim is 63, expected an even number"),
        ({"draft_vocab_size": 700, "tensors": WIDE_HEAD}, "draft_vocab_size is 700, above the model's 600"),
        ({"rope_scaling": [3]}, r"rope_scaling is \[3\], expected an object"),
        ({"rope_scaling": {"mscale": 1.0}}, "rope_scaling.mscale is 1.0, which no rope type that is served has"),
        ({"rope_scaling": {"rope_theta": "x"}}, 'rope_scaling.rope_theta is "x", expected a positive number'),
        ({"rope_scaling": YARN | {"factor": "x"}}, 'rope_scaling.factor is "x", expected a positive number'),
        ({"rope_scaling": YARN | {"truncate": "false"}}, 'rope_scaling.truncate is "false", expected true or false'),
        ({"rope_scaling": YARN, "rope_theta": 1}, "rope_theta is 1, expected a number above 1"),
        ({"rope_scaling": YARN | {"beta_fast": 1}}, r"rope_scaling.beta_fast is 1, expected .* above beta_slow \(1\)"),
        (
            {"rope_scaling": {"rope_type": "llama3", "low_freq_factor": 4}},
            r"high_freq_factor is 4.0, expected a number",
        ),
        *(
            ({"rope_scaling": YARN | {POSITIONS: value}}, f"rope_scaling.{POSITIONS} is .*, expected a positive whole")
            for value in ("abc", [1], float("inf"), 0, -5, True, 4096.5)
        ),
    ],
)
def test_a_configuration_is_refused_by_the_name_of_its_key(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(DraftHeadError, match=message):
        read_draft_head(write_head(tmp_path, MODEL, **keys), MODEL)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({FIRST: None}, f"tensor '{FIRST}' is missing"),
        ({"norm.weight": None}, "tensor 'norm.weight' is missing"),
        ({FIRST: np.zeros((256, 64), np.float32)}, r"q_proj.weight' has shape \(256, 64\), expected \(256, 128\)"),
        ({"fc.weight": np.zeros((64, 256), np.float32)}, r"'fc.weight' has shape \(64, 256\), expected \(64, 192\)"),
        ({"layers.1.mlp.up_proj.weight": np.zeros(3, np.float32)}, "'layers.1.mlp.up_proj.weight' is not part of"),
        ({"input_norm.weight": np.ones(192, np.float32)}, "'input_norm.weight' is not part of an EAGLE-3 head"),
        ({"d2t": None}, "draft_vocab_size is 500, below the model's 600, but tensor 'd2t' is missing"),
        ({"d2t": np.zeros(3, np.int64)}, r"'d2t' has shape \(3,\), expected \(500,\)"),
        ({"d2t": np.zeros(500, np.float32)}, "'d2t' has type F32"),
        ({"d2t": np.full(500, 101)}, "model.safetensors: tensor 'd2t' names tokens outside of the model's 600"),
        ({"d2t": np.full(500, -1)}, "'d2t' names tokens outside"),
        ({"d2t": np.arange(500) % 2}, "model.safetensors: tensor 'd2t' names a token twice"),
        ({"norm.weight": np.zeros(64, np.int8)}, "'norm.weight' has type I8"),
        ({"lm_head.weight": None}, "draft_vocab_size is 500, but tensor 'lm_head.weight' is missing"),
    ],
)
def test_tensors_are_refused_by_their_names(
    tmp_path: Path, tensors: dict[str, np.ndarray | None], message: str
) -> None:
    with pytest.raises(DraftHeadError, match=message):
        read_draft_head(write_head(tmp_path, MODEL, tensors=tensors), MODEL)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(DraftHeadError, match="none is not a folder; a head is a folder with config.json"):
        read_draft_head(tmp_path / "none", MODEL)
    folder = write_head(tmp_path, MODEL)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:1000])
    with pytest.raises(DraftHeadError, match="model.safetensors is truncated or damaged"):
        read_draft_head(folder, MODEL)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(DraftHeadError, match="model.safetensors is missing: pytorch_model.bin is a pickle"):
        read_draft_head(folder, MODEL)
    (folder / "part.safetensors").write_bytes(weights)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"fc.weight": "part.safetensors"}}))
    assert read_draft_head(folder, MODEL).taps == (1, 3, 5)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"fc.weight": "../x.safetensors"}}))
    with pytest.raises(DraftHeadError, match="names a file outside of the folder"):
        read_draft_head(folder, MODEL)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"fc.weight": "x.safetensors"}}))
    with pytest.raises(DraftHeadError, match=r"x.safetensors is missing$"):
        read_draft_head(folder, MODEL)
    (folder / "config.json").write_text("[")
    with pytest.raises(DraftHeadError, match="config.json is not valid JSON"):
        read_draft_head(folder, MODEL)
    (folder / "config.json").unlink()
    with pytest.raises(DraftHeadError, match="config.json is missing"):
        read_draft_head(folder, MODEL)
    (folder / "config.json").mkdir()
    with pytest.raises(DraftHeadError, match=r"config.json is not a file$"):
        read_draft_head(folder, MODEL)


def settings(folder: Path, **keys: Any) -> EngineConfig:
    limits = {"max_model_len": 256, "max_num_seqs": 4, "max_num_batched_tokens": 64}
    return EngineConfig(model=MODEL, model_path=None, load_format="dummy", speculative_model=folder, **(limits | keys))


@pytest.mark.parametrize(
    "keys",
    [
        {"num_speculative_tokens": 0},
        {"tensor_parallel_size": 2},
        {"pipeline_parallel_size": 2},
        {"backend": "transformers"},
        {"dtype": "float16"},
    ],
)
def test_keys_that_rule_a_head_out_are_named(tmp_path: Path, keys: dict[str, Any]) -> None:
    folder = write_head(tmp_path, MODEL)
    name = next(iter(keys))
    with pytest.raises(ConfigError, match=rf"speculative_model \(--speculative-model\) does not go with {name}"):
        settings(folder, **keys)
    assert settings(folder).draft_head is not None
    with pytest.raises(ConfigError, match=r"speculative_model \(--speculative-model\): .* is not a folder"):
        settings(tmp_path / "none")


def test_the_memory_plan_counts_the_head(tmp_path: Path) -> None:
    config = settings(write_head(tmp_path, MODEL))
    plain = dataclasses.replace(config, speculative_model=None)
    memory = [10**10]
    with_head, without = (
        make_plan(one, memory, memory, tensor_size=1, stages=1, element=2).ranks[0] for one in (config, plain)
    )
    assert config.draft_head is not None
    num_elements = 64 * 192 + 512 * 128 + 64 * 256 + 3 * 96 * 64 + 4 * 64 + 500 * 64 + 500
    assert config.draft_head.num_elements == num_elements
    assert (with_head.head_bytes, without.head_bytes) == (2 * num_elements, 0)
    held = 3 * (config.max_graph_rows + 2 * max(config.prompt_graph_sizes)) * 64 * 4  # the states of graphs
    held += 3 * config.max_num_batched_tokens * 64 * 4  # and of a step without one
    assert with_head.activation_bytes - without.activation_bytes == held
    assert with_head.kv_bytes == without.kv_bytes - 2 * num_elements - held
    assert with_head.kv_bytes_per_token - without.kv_bytes_per_token == 2 * 2 * 64 * 2
    plan = make_plan(config, memory, memory, tensor_size=1, stages=1, element=2)
    assert "draft head 0.00 GB" in plan.lines()[1]


def test_the_states_of_long_prompts_and_the_head_s_own_layer_are_planned(tmp_path: Path) -> None:
    wide = ModelConfig.from_json(
        hf_config(Size(layers=6, hidden=512, intermediate=32, experts=4, heads=4, kv_heads=2)) | {"vocab_size": 600}
    )
    tokens, state = 4096, 4096 * 512 * 4
    given = {"model": wide, "max_num_batched_tokens": tokens, "max_num_seqs": 1, "enforce_eager": True}
    limits = {"max_model_len": 256, "model_path": None, "load_format": "dummy"}
    three, one = (
        EngineConfig(**given, **limits, speculative_model=write_head(tmp_path / name, wide, taps=taps))
        for name, taps in (("three", (1, 3, 5)), ("one", (6,)))
    )
    plain = dataclasses.replace(three, speculative_model=None)
    memory = [10**10]
    steps = [
        make_plan(config, memory, memory, tensor_size=1, stages=1, element=2).ranks[0].activation_bytes
        for config in (three, one, plain)
    ]
    layer = layer_bytes(wide, whole(wide), 2, tokens, 1)
    fused = 9 * state + 6 * tokens * 512 * 2 + tokens * (512 + 2 * 8 * 64) * 2
    assert steps[0] - steps[2] == 3 * state + fused - layer, "fusing three states takes more than this narrow layer"
    assert steps[1] - steps[2] == state + max(0, fused - 3 * state - 2 * tokens * 512 * 2 - layer)
    assert EngineConfig(**given, **limits).draft_head is None and steps[2] > layer
