"""An EAGLE-3 head with gradients, unrolled over its own guesses (Li et al. 2025, arXiv 2503.01840, section 3.2).

Shapes: B sequences, T positions, H hidden, N query heads, G key-value heads, D head_dim, V vocabulary of the head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

EPS = 1e-5
THETA = 10_000.0
UNSEEN = -1e9  # of padding all is unseen, which must not be NaN


class HeadNetwork(nn.Module):
    """One Llama layer over [embedding of the next token, state]."""

    def __init__(
        self, hidden: int, num_taps: int, inter: int, lm_head: torch.Tensor, norm: torch.Tensor, heads: int = 4
    ) -> None:
        """`lm_head` float32 [V, H] and `norm` [H] are where the output head begins: the model's own."""
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, heads // 2, 64
        q_dim, kv_dim = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.input_norm = nn.Parameter(torch.ones(num_taps * hidden))
        self.fc = nn.Linear(num_taps * hidden, hidden, bias=False)
        with torch.no_grad():  # the state of the last tap, and a little of the others
            self.fc.weight.mul_(0.2)[:, -hidden:] += torch.eye(hidden)
        self.embed_norm = nn.Parameter(torch.ones(hidden))
        self.hidden_norm = nn.Parameter(torch.ones(hidden))
        self.q = nn.Linear(2 * hidden, q_dim, bias=False)
        self.k = nn.Linear(2 * hidden, kv_dim, bias=False)
        self.v = nn.Linear(2 * hidden, kv_dim, bias=False)
        self.o = nn.Linear(q_dim, hidden, bias=False)
        self.mlp_norm = nn.Parameter(torch.ones(hidden))
        self.gate = nn.Linear(hidden, inter, bias=False)
        self.up = nn.Linear(hidden, inter, bias=False)
        self.down = nn.Linear(inter, hidden, bias=False)
        self.norm = nn.Parameter(norm.clone())
        self.lm_head = nn.Parameter(lm_head.clone())

    def forward(
        self, states: torch.Tensor, embedded: torch.Tensor, lengths: torch.Tensor, num_guessed: int, depth: int
    ) -> list[torch.Tensor]:
        """states [B, T, taps H] at each position, embedded [B, T + depth - 1, H] of the tokens after them.

        Sequences end together: `lengths` [B] positions count, padding comes before them. Returns the normed states
        [B, S, H] of each of `depth` guesses at the last S = `num_guessed` positions: guess d at position t is of token
        t + 2 + d, given the tokens up to t + 1 + d.
        """
        count = states.shape[1]
        hidden, first = self.fc(rms_norm(states, self.input_norm)), count - num_guessed
        padding = torch.arange(count) < count - lengths[:, None]
        future = torch.arange(count) > torch.arange(first, count)[:, None]
        unseen = (padding[:, None] | future)[:, None]  # [B, 1, S, T]
        keys: list[torch.Tensor] = []
        values: list[torch.Tensor] = []
        normed_states = []
        for number in range(depth):
            begin = number and first + number
            both = (
                rms_norm(embedded[:, begin : count + number], self.embed_norm),
                rms_norm(hidden, self.hidden_norm),
            )
            query, key, value = self._rotated(torch.cat(both, dim=-1), begin)
            keys.append(key)
            values.append(value)
            hidden = hidden[:, -num_guessed:]
            x = hidden + self.o(self._attended(query[:, :, -num_guessed:], keys, values, unseen))
            normed = rms_norm(x, self.mlp_norm)
            hidden = x + self.down(F.silu(self.gate(normed)) * self.up(normed))
            normed_states.append(rms_norm(hidden, self.norm))
        return normed_states

    def logits(self, normed: torch.Tensor) -> torch.Tensor:
        """[.., H] -> [.., V]."""
        return normed @ self.lm_head.T

    def _rotated(self, x: torch.Tensor, offset: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries [B, N, T, D], and keys and values [B, N, T, D] repeated for them."""
        batch, count, _ = x.shape
        frequencies = THETA ** -(torch.arange(0, self.head_dim, 2) / self.head_dim)
        angles = torch.arange(offset, offset + count)[:, None] * frequencies
        parts = [
            part.view(batch, count, -1, self.head_dim).transpose(1, 2) for part in (self.q(x), self.k(x), self.v(x))
        ]
        query, key = (rotate(part, angles.cos(), angles.sin()) for part in parts[:2])
        repeat = self.heads // self.kv_heads
        return query, key.repeat_interleave(repeat, 1), parts[2].repeat_interleave(repeat, 1)

    def _attended(
        self, query: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor], unseen: torch.Tensor
    ) -> torch.Tensor:
        """A guess sees the positions up to its own, and the guesses that lead to it -> [B, S, N D]."""
        scale, count = self.head_dim**-0.5, keys[0].shape[2]
        first = (query @ keys[0].transpose(-1, -2) * scale).masked_fill(unseen, UNSEEN)
        later = [(query * key).sum(-1, keepdim=True) * scale for key in keys[1:]]
        weights = torch.cat([first, *later], dim=-1).softmax(-1)
        out = weights[..., :count] @ values[0]
        for number, value in enumerate(values[1:]):
            out = out + weights[..., count + number, None] * value
        return out.transpose(1, 2).flatten(2)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors by the names of the published format, bfloat16."""
        a, m = "midlayer.self_attn.", "midlayer.mlp."
        named = {
            "input_norm": self.input_norm,
            "fc": self.fc.weight,
            "midlayer.input_layernorm": self.embed_norm,
            "midlayer.hidden_norm": self.hidden_norm,
            "midlayer.post_attention_layernorm": self.mlp_norm,
            "norm": self.norm,
            "lm_head": self.lm_head,
        }
        named |= {f"{a}{x}_proj": getattr(self, x).weight for x in "qkvo"}
        named |= {f"{m}{x}_proj": getattr(self, x).weight for x in ("gate", "up", "down")}
        return {f"{name}.weight": tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in named.items()}


def rms_norm(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, (x.shape[-1],), scale, EPS)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
