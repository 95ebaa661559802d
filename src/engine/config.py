"""EngineConfig: what the engine's process gets at start, without facts that only the device knows."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from gptoss.config.engine_keys import DeviceKeys, EngineKeys, LoraKeys
from gptoss.config.errors import ConfigError
from gptoss.engine.model.draft_head import DraftHead, read_draft_head
from gptoss.engine.model.draft_head_config import DraftHeadError
from gptoss.engine.model.model_config import ModelConfig

DEFAULT_DRAFTS = 3  # tokens; a step of four tokens costs little more than a step of one
SCORED_ROWS = 64  # most prompt tokens of a step whose logits are computed: one row is 0.8 MB


@dataclass(frozen=True, kw_only=True)
class EngineConfig(LoraKeys, EngineKeys, DeviceKeys):
    """The engine's keys of the configuration, and what the launcher derives. Limits are named as in vLLM."""

    model: ModelConfig = field(kw_only=False)
    model_path: Path | None = field(kw_only=False)  # a folder or a GGUF file; None only with load_format "dummy"
    # keys that the server leaves to the profile or the model until the engine starts
    max_model_len: int = 131_072
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 2_048
    max_num_waiting: int = 256
    batch_invariant: bool = False
    # the engine's GPUs, as the server's process numbers them; None: all of them
    gpus: tuple[int, ...] | None = None
    # the vocabulary
    ranks_path: Path | None = None  # in tiktoken form; needed for grammars only
    special_tokens: dict[str, int] = field(default_factory=dict)
    split_pattern: str = ""
    eos_token_ids: tuple[int, ...] = ()
    probe_token_ids: tuple[int, ...] = tuple(range(1, 29))  # the prompt of the self-test at start

    @property
    def num_ranks(self) -> int:
        return max(1, self.tensor_parallel_size) * max(1, self.pipeline_parallel_size)

    @property
    def ranks_per_node(self) -> int:
        return self.num_ranks // self.nnodes

    @property
    def max_drafts(self) -> int:
        """Draft tokens of one step, where the engine can check any."""
        return DEFAULT_DRAFTS if self.num_speculative_tokens < 0 else self.num_speculative_tokens

    @property
    def max_graph_rows(self) -> int:
        """Rows of the largest decode graph: the tokens of all requests, or of a few with drafts."""
        return max(self.max_num_seqs, 1 + self.max_drafts)

    @property
    def decode_graph_sizes(self) -> list[int]:
        """Rows of the decode graphs: few, then steps of 16 to 128, and of 32 to the largest."""
        most = self.max_graph_rows
        sizes = [1, 2, 4, 8, 16, 24, 32, *range(48, 129, 16), *range(160, most, 32)]
        return sorted({s for s in sizes if s < most} | {most})

    @property
    def prompt_graph_sizes(self) -> list[int]:
        """Tokens of the graphs of pieces of prompts. Steps with more take the device longer than the host."""
        return [n for n in (16, 32, 64, 128, 256, 512) if n <= self.max_num_batched_tokens]

    def __post_init__(self) -> None:
        self._check_limits()
        self._check_gpu_mode()
        self._check_dense_dtype()
        self._check_fp8()
        self._check_lora()
        self._check_nodes()
        self._check_draft_head()
        if self.backend == "transformers" and self.model_path is not None and self.model_path.is_file():
            raise ConfigError(
                f"backend 'transformers' does not read GGUF files: drop it, or convert {self.model_path} with "
                "`gptoss convert`"
            )

    def _check_limits(self) -> None:
        """Raises ConfigError for limits that contradict each other or the model."""
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) is below max_num_seqs ({self.max_num_seqs}): "
                "a step could not hold one token of each running request; raise it, or lower max_num_seqs"
            )
        if self.max_model_len > self.model.max_position:
            raise ConfigError(
                f"max_model_len ({self.max_model_len}) is beyond the model's {self.model.max_position} positions"
            )
        if self.num_speculative_tokens < -1:
            raise ConfigError(
                f"num_speculative_tokens ({self.num_speculative_tokens}) must be a count, 0 for none, or -1 for "
                "what suits the machine"
            )
        if self.block_size < 1 or self.block_size & (self.block_size - 1):
            raise ConfigError(f"block_size ({self.block_size}) must be a power of two")

    def _check_gpu_mode(self) -> None:
        """Raises ConfigError for a gpu_mode that contradicts a parallel size."""
        if self.gpu_mode == "single" and max(self.tensor_parallel_size, self.pipeline_parallel_size) > 1:
            raise ConfigError(
                f"gpu_mode 'single' contradicts tensor_parallel_size ({self.tensor_parallel_size}) and "
                f"pipeline_parallel_size ({self.pipeline_parallel_size}); drop one of them"
            )
        if self.gpu_mode == "tensor" and self.tensor_parallel_size == 1:
            raise ConfigError("gpu_mode 'tensor' contradicts tensor_parallel_size (1); drop one of them")
        if self.gpu_mode == "pipeline" and self.pipeline_parallel_size == 1:
            raise ConfigError("gpu_mode 'pipeline' contradicts pipeline_parallel_size (1); drop one of them")

    def _check_nodes(self) -> None:
        """Raises ConfigError for a model over several hosts that cannot be."""
        if self.node_rank >= self.nnodes:
            raise ConfigError(f"node_rank ({self.node_rank}) must be below nnodes ({self.nnodes})")
        if self.nnodes == 1:
            return
        if self.master_addr is None:
            raise ConfigError(f"nnodes ({self.nnodes}) needs master_addr, the address of host 0 for the other hosts")
        if self.num_ranks % self.nnodes:
            raise ConfigError(
                f"tensor_parallel_size ({self.tensor_parallel_size}) x pipeline_parallel_size "
                f"({self.pipeline_parallel_size}) must be a multiple of nnodes ({self.nnodes}): set them to the ranks "
                "of all hosts together"
            )
        alone = {"data_parallel_size": self.data_parallel_size == 1, "backend": self.backend == "native"}
        alone |= {"lora": not self.lora, "lora_dir": self.lora_dir is None}
        alone["device"] = not self.device.startswith("cuda:")
        for name, is_possible in alone.items():
            if not is_possible:
                raise ConfigError(
                    f"nnodes ({self.nnodes}) does not go with {name} {getattr(self, name)!r}; drop one of them"
                )

    def _check_dense_dtype(self) -> None:
        """Raises ConfigError for int8 with a key that rules the native CPU kernels out."""
        if self.dense_dtype == "auto":
            return
        others = {"backend": self.backend != "transformers", "device": not self.device.startswith("cuda")}
        others["dtype"] = self.dtype in ("auto", "bfloat16")
        for name, is_possible in others.items():
            if not is_possible:
                raise ConfigError(
                    f"dense_dtype '{self.dense_dtype}' (--dense-dtype) needs the native CPU kernels, which "
                    f"{name} {getattr(self, name)!r} rules out; drop one of them"
                )

    def _check_draft_head(self) -> None:
        """Raises ConfigError for a head that cannot be served, or a key that rules heads out."""
        if self.speculative_model is None:
            return
        possible = {"backend": self.backend == "native", "num_speculative_tokens": self.num_speculative_tokens != 0}
        possible |= {key: getattr(self, key) <= 1 for key in ("tensor_parallel_size", "pipeline_parallel_size")}
        possible |= {"nnodes": self.nnodes == 1, "dtype": self.dtype != "float16"}
        for key, is_possible in possible.items():
            if not is_possible:
                raise ConfigError(
                    f"speculative_model (--speculative-model) does not go with {key} {getattr(self, key)!r}; drop one "
                    "of them"
                )
        try:
            read_draft_head(self.speculative_model, self.model)
        except DraftHeadError as error:
            raise ConfigError(f"speculative_model (--speculative-model): {error}") from None

    @property
    def draft_head(self) -> DraftHead | None:
        """The head of speculative_model."""
        return None if self.speculative_model is None else read_draft_head(self.speculative_model, self.model)

    def _check_fp8(self) -> None:
        """Raises ConfigError for FP8 with a backend that has its own cache and weights."""
        for key, flag in (("kv_cache_dtype", "--kv-cache-dtype"), ("lm_head_dtype", "--lm-head-dtype")):
            value = getattr(self, key)
            if value != "auto" and self.backend == "transformers":
                raise ConfigError(f"{key} '{value}' ({flag}) needs backend 'native'; drop one of them")

    @property
    def has_fp8_cache(self) -> bool:
        return self.kv_cache_dtype != "auto"

    def _check_lora(self) -> None:
        """Raises ConfigError for adapters with a backend or a model that has none."""
        if self.has_lora and self.model.layer_experts:
            raise ConfigError("lora and lora_dir: this model's layers differ in their number of experts; drop them")
        if self.has_lora and self.backend == "transformers":
            key = "lora (--lora)" if self.lora else "lora_dir (--lora-dir)"
            raise ConfigError(f"{key} needs backend 'native': 'transformers' serves no adapters; drop one of them")

    @property
    def has_lora(self) -> bool:
        """Whether adapters may be loaded."""
        return bool(self.lora) or self.lora_dir is not None

    @property
    def lora_budget_bytes(self) -> int:
        """Bytes of all adapters together."""
        if not self.has_lora:
            return 0
        return self.max_loras * self.attention_adapter_bytes if self.max_lora_bytes is None else self.max_lora_bytes

    @property
    def lora_element_bytes(self) -> int:
        return 4 if self.dtype == "float32" else 2

    @property
    def attention_adapter_bytes(self) -> int:
        """Bytes of an adapter of max_lora_rank for all matrices of the attention and the router."""
        c = self.model
        heads, groups = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        sizes = 5 * c.hidden_size + 2 * heads + 2 * groups + c.num_experts
        return c.num_layers * sizes * self.max_lora_rank * self.lora_element_bytes
