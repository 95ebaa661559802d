#!/usr/bin/env bash
# peft 0.21.2 with transformers 5.23.0: patterns of expert parameters match a name that the saved keys do not show.
#
# One would guess: the keys of a saved adapter name the modules that `rank_pattern` matches, so `{"mlp.experts": 2}` sets the rank of
# gpt-oss's experts; and a bias is refused as a target, as PEFT adapts no biases of linear layers.
# Behaviour: keys are `...mlp.experts.lora_A.weight`, but the pattern is matched with the parameter's own name,
# `...mlp.experts.down_proj`: `{"mlp.experts": 2}` has no effect and no warning, `{"mlp.experts.down_proj": 2}` has. The bias
# `mlp.experts.gate_up_proj_bias` is accepted as a target, because its shape [experts, out] looks like a weight's, and is saved under the same
# keys as a real one: only shapes tell them apart.
# Source: peft/tuners/lora/layer.py (ParamWrapper) and peft/tuners/tuners_utils.py of the wheel.
#
# Output seen:
#   rank with {'mlp.experts': 2}: 4
#   rank with {'mlp.experts.down_proj': 2}: 2
#   target gate_up_proj_bias: accepted, keys end with mlp.experts.lora_A.weight, mlp.experts.lora_B.weight
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 peft==0.21.2
cat >"$dir/show.py" <<'PY'
import sys
import warnings

from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from transformers import GptOssConfig, GptOssForCausalLM

warnings.simplefilter("ignore")


def saved(**options):
    config = GptOssConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_local_experts=2,
        num_experts_per_tok=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        layer_types=["full_attention"], rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    model = get_peft_model(GptOssForCausalLM(config), LoraConfig(r=4, target_modules=[], **options))
    return {name: tuple(value.shape) for name, value in get_peft_model_state_dict(model).items()}


ranks = []
for pattern in ({"mlp.experts": 2}, {"mlp.experts.down_proj": 2}):
    keys = saved(target_parameters=["mlp.experts.down_proj"], rank_pattern=pattern)
    (shape,) = [value for name, value in keys.items() if "lora_A" in name]
    ranks.append(shape[0] // 2)  # [experts x rank, in]
    print(f"rank with {pattern}: {ranks[-1]}")
ends = sorted(".".join(name.split(".")[-4:]) for name in saved(target_parameters=["mlp.experts.gate_up_proj_bias"]))
print("target gate_up_proj_bias: accepted, keys end with", ", ".join(ends))
if ranks != [4, 2] or ends != ["mlp.experts.lora_A.weight", "mlp.experts.lora_B.weight"]:
    sys.exit("the behaviour changed")
PY
"$dir/venv/bin/python" "$dir/show.py"
