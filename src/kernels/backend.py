"""The operations of a gpt-oss layer, in three implementations of which a worker chooses one.

    torch   reference/  any device and type; slow; what the others are tested against
    native  cpu/        bfloat16 on a CPU with AVX2 or AVX-512, compiled C++
    triton  triton/     bfloat16 on a GPU of sm_80 or later

Shapes: T tokens, H hidden, N query heads, D head_dim, V vocabulary, R rows to sample from.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol, TypeVar

import torch

from gptoss.kernels.cpu import native
from gptoss.kernels.cpu.backend import CpuBackend, DenseDtype
from gptoss.kernels.layers import DenseWeight, HeadDtype, HeadWeight, LayerCache, LayerShape, LayerWeights
from gptoss.kernels.reference.backend import ReferenceBackend
from gptoss.kernels.step_layout import StepLayout
from gptoss.kernels.triton import support

Step = TypeVar("Step")  # what a backend makes of a step's layout: positions, and the attention metadata of each group
SamplingKernels = Literal["torch", "native", "triton"]
StepIn = TypeVar("StepIn", contravariant=True)


class LayerStack(Protocol[StepIn]):
    """All layers of a stage as one call."""

    def __call__(self, x: torch.Tensor, cache: list[LayerCache], step: StepIn) -> torch.Tensor:
        """x [T, H], which may be changed in place -> [T, H]."""
        ...


class KernelBackend(Protocol[Step]):
    """What the model and the worker call. A backend is made for one rank's layers."""

    name: str
    device: torch.device
    dtype: torch.dtype
    shape: LayerShape
    is_batch_invariant: bool  # whether a token's bits do not depend on the rest of the batch
    reads_mxfp4: bool  # whether packed experts are its fastest form
    reads_stored_experts: bool  # whether it reads them in the order of the file
    min_block_size: int

    def for_shape(self, shape: LayerShape) -> KernelBackend[Step]:
        """Returns these kernels for layers of another shape, with matrices in the plain type."""
        ...

    def prepare_layer(self, layer: LayerWeights) -> LayerWeights:
        """A layer in the form that the kernels read fastest."""
        ...

    def prepare_head(self, weight: torch.Tensor) -> HeadWeight:
        """The output head in the form that norm_head reads fastest."""
        ...

    def prepare_step(self, layout: StepLayout) -> Step:
        """What the operations of one step need of its layout, on the device."""
        ...

    def layer_stack(self, layers: list[LayerWeights]) -> LayerStack[Step] | None:
        """All `layers` as one call, or None where there is no such kernel."""
        ...

    def norm_qkv(self, x: torch.Tensor, layer: LayerWeights, cache: LayerCache, step: Step) -> torch.Tensor:
        """x [T, H] -> rotated queries, [T, at least N, D]. The new keys and values are written to the cache."""
        ...

    def attention(self, query: torch.Tensor, layer: LayerWeights, cache: LayerCache, step: Step) -> torch.Tensor:
        """What norm_qkv returned -> [T, N D]."""
        ...

    def linear(
        self, x: torch.Tensor, weight: DenseWeight, bias: torch.Tensor | None, residual: torch.Tensor | None
    ) -> torch.Tensor:
        """x [T, K], weight [H, K] -> residual + x weight^T + bias, [T, H]. None: zeros."""
        ...

    def add_out_lora(self, out: torch.Tensor, x: torch.Tensor, layer: LayerWeights, step: Step) -> None:
        """Adds to `out` [T, H] what the step's adapters add to the output projection of x [T, K]."""
        ...

    def norm_moe(self, x: torch.Tensor, layer: LayerWeights, residual: torch.Tensor, step: Step) -> torch.Tensor:
        """x [T, H] -> residual + what the experts add, [T, H]."""
        ...

    def norm_head(
        self, x: torch.Tensor, rows: torch.Tensor, norm: torch.Tensor, head: HeadWeight, step: Step
    ) -> torch.Tensor:
        """x [T, H], rows int64 [R] -> logits float32 [R, V]."""
        ...


def choose_backend(
    device: torch.device,
    dtype: torch.dtype,
    shape: LayerShape,
    *,
    batch_invariant: bool = False,
    dense_dtype: DenseDtype = "auto",
    lm_head_dtype: HeadDtype = "auto",
) -> KernelBackend[Any]:
    """The fastest backend for that device and type.

    `batch_invariant` costs some of the Triton kernels' speed. `lm_head_dtype` fp8: check_fp8 says whether it has that.

    Raises:
        ValueError: that backend does not have `dense_dtype`.
    """
    is_triton = support.runs_triton(device, dtype)
    is_native = not is_triton and device.type == "cpu" and native.supports(dtype)
    if dense_dtype == "int8" and not is_native:
        raise ValueError(f"'int8' needs the native CPU kernels, which do not run here on {device} in {dtype}")
    if is_triton:
        from gptoss.kernels.triton.backend import TritonBackend  # a server on a CPU never loads triton

        return TritonBackend(shape, dtype, device, batch_invariant=batch_invariant, lm_head_dtype=lm_head_dtype)
    if is_native:
        return CpuBackend(shape, dense_dtype)
    return ReferenceBackend(shape, dtype, device, lm_head_dtype=lm_head_dtype)


def check_fp8(kernels: KernelBackend[Any]) -> None:
    """Raises ValueError where FP8 is not supported: on old GPUs, and by the native CPU kernels."""
    if kernels.name == "native":
        raise ValueError("is not supported by the native CPU kernels, which compute in bfloat16")
    if not support.has_fp8(kernels.device):
        raise ValueError(
            f"needs a GPU of sm_89 or later, and {kernels.device} is {support.architecture(kernels.device)}"
        )


def choose_sampling(device: torch.device) -> SamplingKernels:
    """The fastest kernels that pick tokens on that device; logits are float32 whatever the model's type."""
    if support.samples(device):
        return "triton"
    return "native" if device.type == "cpu" and native.library() is not None else "torch"
