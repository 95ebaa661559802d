"""Measures triton_kernels' matmul_ogs for comparison, called as gpt-oss's Triton backend does, on the same shapes.

Needs the source of triton_kernels (triton-lang/triton, python/triton_kernels, of the installed release) on PYTHONPATH.
The package of that name on PyPI is a different one.

    PYTHONPATH=triton/python/triton_kernels python -m bench.gpu.anchor [--models 20b 120b] [--tokens 1 32]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

import torch

from bench.arguments import whole
from bench.gpu.timing import Row, measure_ceilings, time_us
from gptoss.engine.model.named_sizes import SIZES

LIMIT = 7.0


def rows(model: str, sizes: tuple[int, ...]) -> Iterator[Row]:
    """Raises ImportError where triton_kernels, or a part of it by the name that gpt-oss uses, is not there."""
    import triton_kernels.swiglu
    from triton_kernels.matmul_ogs import FlexCtx, FnSpecs, FusedActivation, PrecisionConfig, matmul_ogs
    from triton_kernels.numerics import InFlexData
    from triton_kernels.numerics_details.mxfp import downcast_to_mxfp
    from triton_kernels.routing import routing
    from triton_kernels.tensor import FP4, convert_layout, wrap_torch_tensor
    from triton_kernels.tensor_details.layout import HopperMXValueLayout, StridedLayout

    size = SIZES[model]
    hidden, inter = size.hidden, size.intermediate

    def quantised(rows: int, columns: int) -> tuple[object, object]:
        w = torch.randn(size.experts, rows, columns, device="cuda", dtype=torch.bfloat16)
        w, scale = downcast_to_mxfp(w, torch.uint8, axis=1)
        w = convert_layout(wrap_torch_tensor(w, dtype=FP4), HopperMXValueLayout, mx_axis=1)
        return w, convert_layout(wrap_torch_tensor(scale), StridedLayout)

    (w1, s1), (w2, s2) = quantised(hidden, 2 * inter), quantised(inter, hidden)
    b1 = torch.randn(size.experts, 2 * inter, device="cuda")
    b2 = torch.randn(size.experts, hidden, device="cuda")
    one, two = (PrecisionConfig(weight_scale=s, flex_ctx=FlexCtx(rhs_data=InFlexData())) for s in (s1, s2))
    act = FusedActivation(FnSpecs("swiglu", triton_kernels.swiglu.swiglu_fn, ("alpha", "limit")), (1.702, LIMIT), 2)
    for tokens in sizes:
        x = torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16)
        logits = torch.randn(tokens, size.experts, device="cuda", dtype=torch.bfloat16)
        used = int(logits.topk(4).indices.unique().numel())
        data, gather, scatter = routing(logits, 4, simulated_ep=1)

        def up(x: torch.Tensor = x, data: object = data, gather: object = gather) -> torch.Tensor:
            return matmul_ogs(x, w1, b1, data, gather_indx=gather, precision_config=one, fused_activation=act)

        middle = up()

        def down(h: torch.Tensor = middle, data: object = data, scatter: object = scatter) -> torch.Tensor:
            return matmul_ogs(h, w2, b2, data, scatter_indx=scatter, precision_config=two, gammas=data.gate_scal)

        for name, run, weights in (("moe_w1", up, 2 * inter * hidden), ("moe_w2", down, inter * hidden)):
            flops = 2 * tokens * 4 * weights if tokens >= 512 else 0
            yield Row(
                "anchor",
                f"{model} {name} by triton_kernels, {tokens} tokens",
                time_us(run),
                weights * 17 // 32 * used,
                flops,
            )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["20b"], choices=("20b", "120b"))
    parser.add_argument("--tokens", nargs="+", type=whole(1, 131_072), default=[1, 32])
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        sys.stderr.write("no NVIDIA GPU here: there is nothing to measure\n")
        return 3
    from bench.gpu.steps import show

    ceilings = measure_ceilings()
    try:
        for model in args.models:
            for row in rows(model, tuple(args.tokens)):
                show(row.as_dict(ceilings))
    except ImportError as error:
        sys.stderr.write(f"{error}: put the source of triton_kernels on PYTHONPATH (see --help)\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
