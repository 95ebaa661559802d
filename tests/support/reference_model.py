"""gpt-oss written a second time, slowly and straight from the formulas, as an oracle that shares no code with src/.

One sequence, no cache, float32, dense masks, a Python loop over tokens and experts. Sources: gpt-oss model card,
section 2; YaRN, arXiv 2309.00071; OCP Microscaling Formats v1.0.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors import safe_open

FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


class ReferenceModel:
    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        self.tensors: dict[str, torch.Tensor] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as f:
                for name in f.keys():  # noqa: SIM118  a safetensors handle is no mapping
                    self.tensors[name] = f.get_tensor(name)

    def get(self, name: str) -> torch.Tensor:
        return self.tensors[name].float()

    def logits(self, token_ids: list[int]) -> torch.Tensor:
        """-> float32 [T, V]."""
        c = self.config
        x = self.get("model.embed_tokens.weight")[token_ids]
        for n in range(c["num_hidden_layers"]):
            layer = f"model.layers.{n}."
            x = x + self.attention(self.norm(x, layer + "input_layernorm.weight"), n)
            x = x + self.mlp(self.norm(x, layer + "post_attention_layernorm.weight"), n)
        return self.norm(x, "model.norm.weight") @ self.get("lm_head.weight").T

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.config["rms_norm_eps"]) * self.get(name)

    def attention(self, x: torch.Tensor, n: int) -> torch.Tensor:
        c, prefix = self.config, f"model.layers.{n}.self_attn."
        num_tokens, dim = len(x), c["head_dim"]

        def project(name: str) -> torch.Tensor:
            y = x @ self.get(f"{prefix}{name}_proj.weight").T + self.get(f"{prefix}{name}_proj.bias")
            return y.view(num_tokens, -1, dim)

        q, k, v = self.rotate(project("q")), self.rotate(project("k")), project("v")
        sinks = self.get(prefix + "sinks")
        blocks = c.get("block_configs") or [{"sliding_window": c["sliding_window"]}, {"sliding_window": None}] * (n + 1)
        window = blocks[n]["sliding_window"] or num_tokens
        out = torch.zeros_like(q)
        for head in range(c["num_attention_heads"]):
            group = head // (c["num_attention_heads"] // c["num_key_value_heads"])
            scores = q[:, head] @ k[:, group].T / math.sqrt(dim)
            distance = torch.arange(num_tokens)[:, None] - torch.arange(num_tokens)[None, :]
            scores[(distance < 0) | (distance >= window)] = -torch.inf
            column = sinks[head].expand(num_tokens, 1)
            weights = torch.softmax(torch.cat((scores, column), dim=1), dim=1)[:, :-1]
            out[:, head] = weights @ v[:, group]
        return out.flatten(1) @ self.get(prefix + "o_proj.weight").T + self.get(prefix + "o_proj.bias")

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """Pairs (d, d + D/2) turned by position * frequency, frequencies by YaRN without truncation."""
        c = self.config
        rope = c.get("rope_scaling") or c["rope_parameters"]
        theta, dim, factor = (c.get("rope_theta") or rope["rope_theta"], c["head_dim"], rope["factor"])
        original = rope["original_max_position_embeddings"]
        low, high = (
            dim / 2 * math.log(original / (beta * 2 * math.pi)) / math.log(theta)
            for beta in (rope["beta_fast"], rope["beta_slow"])
        )
        out = torch.empty_like(x)
        scale = 0.1 * math.log(factor) + 1
        positions = torch.arange(len(x), dtype=torch.float32)[:, None]
        for d in range(dim // 2):
            frequency = theta ** (-2 * d / dim)
            interpolated = min(max((d - low) / (high - low), 0), 1)
            angle = positions * (frequency / factor * interpolated + frequency * (1 - interpolated))
            cos, sin = scale * angle.cos(), scale * angle.sin()
            a, b = x[..., d], x[..., d + dim // 2]
            out[..., d], out[..., d + dim // 2] = a * cos - b * sin, b * cos + a * sin
        return out

    def mlp(self, x: torch.Tensor, n: int) -> torch.Tensor:
        c, prefix = self.config, f"model.layers.{n}.mlp."
        router = x @ self.get(prefix + "router.weight").T + self.get(prefix + "router.bias")
        out = torch.zeros_like(x)
        matrices = {
            e: self.expert(prefix, e) for e in set(router.topk(c["num_experts_per_tok"]).indices.flatten().tolist())
        }
        for t, logits in enumerate(router):
            best = logits.topk(c["num_experts_per_tok"])
            weights = torch.softmax(best.values, dim=0)
            for weight, e in zip(weights, best.indices.tolist(), strict=True):
                w1, b1, w2, b2 = matrices[e]
                h = w1 @ x[t] + b1
                gate, up = (h[0::2].clamp(max=c["swiglu_limit"]), h[1::2].clamp(-c["swiglu_limit"], c["swiglu_limit"]))
                out[t] += weight * (w2 @ (gate * torch.sigmoid(1.702 * gate) * (up + 1)) + b2)
        return out

    def expert(self, prefix: str, e: int) -> tuple[torch.Tensor, ...]:
        w1, w2 = (self.expert_matrix(f"{prefix}experts.{name}", e) for name in ("gate_up_proj", "down_proj"))
        return (
            w1,
            self.tensors[prefix + "experts.gate_up_proj_bias"][e].float(),
            w2,
            self.tensors[prefix + "experts.down_proj_bias"][e].float(),
        )

    def expert_matrix(self, name: str, e: int) -> torch.Tensor:
        if name in self.tensors:
            return self.tensors[name][e].float().T
        blocks, scales = self.tensors[name + "_blocks"][e].int(), self.tensors[name + "_scales"][e]
        rows = torch.zeros(*blocks.shape[:2], 32)
        for half in (0, 1):
            nibble = (blocks >> (4 * half)) & 15
            rows[..., half::2] = torch.tensor(FP4)[nibble & 7] * torch.where(nibble >= 8, -1.0, 1.0)
        return (rows * 2.0 ** (scales.double() - 127)[..., None].float()).flatten(1)
