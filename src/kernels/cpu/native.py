"""The compiled CPU kernels (native.cpp), built once and called with tensors' addresses.

They serve bfloat16 on CPUs with AVX-512 and its BF16 dot product, or with AVX2 and FMA (`choose_instruction_set` forces
one). Without such a CPU or without a C++ compiler the plain torch functions (`*_ref`) run instead: slower, and
`library()` says why in the log.

Shapes: see native.cpp.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import hashlib
import logging
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import torch

from gptoss.cached_files import CacheError, cached, default_cache_folder
from gptoss.kernels.cpu.metadata import CpuAttentionMetadata
from gptoss.kernels.int8 import Int8Matrix, padded_columns
from gptoss.kernels.lora import MODULES, NUM_MODULES, LayerLora, Module
from gptoss.kernels.mxfp4 import AlternatingMxfp4, GgufGateUp, GgufMxfp4, Mxfp4Tensor

logger = logging.getLogger(__name__)

DenseWeight = torch.Tensor | Int8Matrix
FirstMatrix = torch.Tensor | Mxfp4Tensor | AlternatingMxfp4 | GgufGateUp  # of experts
SecondMatrix = torch.Tensor | Mxfp4Tensor | GgufMxfp4

SOURCE = Path(__file__).with_name("native.cpp")
HEADERS = tuple(
    Path(__file__).with_name(f"{name}.h")
    for name in (
        "simd",
        "pool",
        "team",
        "products",
        "products_avx512",
        "products_avx2",
        "packed_avx2",
        "experts",
        "sampling",
        "moe",
        "lora",
        "decoder",
    )
)
COMPILE_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fopenmp", "-fno-math-errno", "-ffp-contract=off")
# name -> the CPU's flags, the compiler's; the best first
INSTRUCTION_SETS = {
    "avx512": (
        ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16"),
        ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16", "-mfma"),
    ),
    "avx2": (("avx2", "fma"), ("-mavx2", "-mfma")),
}
HEAD_DIM = 64  # what the attention kernel is written for
TENSOR, INDEX, REAL, FLAG = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
ARGUMENT_TYPES = {  # the signatures in native.cpp, decoder.h and sampling.h
    # x, w, scales, bias, residual, out; out_is_float; M, N, K
    "linear": [TENSOR] * 6 + [FLAG] + [INDEX] * 3,
    # w, values, scales; N, K
    "quantize_int8": [TENSOR] * 3 + [INDEX] * 2,
    # x, scale, out; eps; T, H
    "rms_norm": [TENSOR] * 3 + [REAL] + [INDEX] * 2,
    # qkv, cos, sin, slots, key_cache, value_cache; T, heads, groups, D
    "rope_and_store": [TENSOR] * 6 + [INDEX] * 4,
    # qkv, key_cache, value_cache, sinks, out, slots, base, first, last; scale; T, heads, groups
    "attention": [TENSOR] * 9 + [REAL] + [INDEX] * 3,
    # logits, experts, weights; T, E, k
    "route": [TENSOR] * 3 + [INDEX] * 3,
    # x, experts, weights, w1, s1, b1, w2, s2, b2, residual, out, parts; limit; T, k, E, H, I; ups; layout
    "moe": [TENSOR] * 12 + [REAL] + [INDEX] * 5 + [TENSOR, INDEX],
    # layers, plans, x, cos, sin; eps, scale, limit; L, T, H, heads, groups, E, k, I; adapters, slots; S
    "decoder": [TENSOR] * 5 + [REAL] * 3 + [INDEX] * 8 + [TENSOR] * 2 + [INDEX],
    "settle": [],
    # adapters, slots, x, out; first, count; widths; T, K
    "lora_linear": [TENSOR] * 4 + [FLAG] * 2 + [TENSOR] + [INDEX] * 2,
    # adapters, slots, and the arguments of moe
    "lora_moe": [TENSOR] * 14 + [REAL] + [INDEX] * 5 + [TENSOR, INDEX],
    # logits, masks; words; integers, reals, ids, peaks; R, V
    "pick": [TENSOR] * 2 + [INDEX] + [TENSOR] * 4 + [INDEX] * 2,
}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The kernels, or None where they cannot run; the reason is logged once."""
    flags = instruction_flags()
    if flags is None:
        logger.info("native CPU kernels off: this CPU has no %s", " and ".join(INSTRUCTION_SETS["avx2"][0]))
        return None
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        logger.warning("native CPU kernels off: no C++ compiler found (install g++ for several times the speed)")
        return None
    try:
        path = _build(compiler, flags)
        # torch's own OpenMP first: both then share one thread pool and do not compete for the cores
        ctypes.CDLL(str(_torch_openmp()), ctypes.RTLD_GLOBAL)
        _loaded.append(_declared(ctypes.CDLL(str(path))))
        return _loaded[-1]
    except (OSError, CacheError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or error
        logger.warning("native CPU kernels off: %s", reason)
        return None


def instruction_flags() -> tuple[str, ...] | None:
    """The compiler's flags for the chosen instruction set; None: this CPU has none of them."""
    names = available_instruction_sets() if _chosen == "auto" else [_chosen]
    return INSTRUCTION_SETS[names[0]][1] if names else None


def available_instruction_sets() -> list[str]:
    """The instruction sets that this CPU has, the best first."""
    have = _cpu_flags()
    return [name for name, (needed, _) in INSTRUCTION_SETS.items() if have.issuperset(needed)]


def choose_instruction_set(name: str) -> None:
    """Compiles the kernels for `name` from now on: auto, or one of INSTRUCTION_SETS.

    Raises:
        ValueError: this CPU does not have it.
    """
    global _chosen
    if name != "auto" and name not in available_instruction_sets():
        raise ValueError(f"this CPU has no {' and '.join(INSTRUCTION_SETS[name][0])}")
    if name != _chosen:
        _chosen = name
        library.cache_clear()


_chosen = "auto"
_loaded: list[ctypes.CDLL] = []  # of every instruction set that was chosen


def supports(dtype: torch.dtype) -> bool:
    """Whether the kernels run on this machine in that type."""
    return dtype is torch.bfloat16 and library() is not None


def matrix_parts(w: DenseWeight | FirstMatrix | SecondMatrix) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A matrix as the kernels take it: its elements, of GgufGateUp the gate's, and its scales if any."""
    match w:
        case Mxfp4Tensor() | AlternatingMxfp4():
            return w.blocks, w.scales
        case GgufMxfp4():
            return w.blocks, None
        case GgufGateUp():
            return w.gate, None
        case Int8Matrix():
            return w.values, w.scales
    return w, None


def layout_of(w1: FirstMatrix) -> tuple[torch.Tensor | None, int]:
    """The up rows if they are a matrix of their own, and the number of native.cpp's Layout."""
    match w1:
        case AlternatingMxfp4():
            return None, 1
        case GgufGateUp():
            return w1.up, 2
    return None, 0


def quantize_int8(weight: torch.Tensor) -> Int8Matrix:
    """bfloat16 [N, K] -> int8 with a scale for each row: of a few, the one with the least squared error."""
    rows, columns = weight.shape
    values = torch.empty(rows, padded_columns(columns), dtype=torch.int8)
    scales = torch.empty(rows)
    _call("quantize_int8", weight, values, scales, rows, columns)
    return Int8Matrix(values, scales, columns)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor | Int8Matrix,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """x [M, K], weight [N, K] -> [M, N] in bfloat16 or float32, accumulated in float32."""
    rows, columns = x.shape[0], weight.shape[0]
    out = torch.empty(rows, columns, dtype=out_dtype)
    _call(
        "linear", x, *matrix_parts(weight), bias, residual, out, out_dtype == torch.float32, rows, columns, x.shape[1]
    )  # fmt: skip
    return out


def rms_norm(x: torch.Tensor, scale: torch.Tensor, eps: float) -> torch.Tensor:
    out = torch.empty_like(x)
    _call("rms_norm", x, scale, out, eps, *x.shape)
    return out


def rope_and_store(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slots: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    num_heads: int,
) -> None:
    """qkv [T, heads + 2 groups, D] is changed in place."""
    tokens, width, head_dim = qkv.shape
    groups = (width - num_heads) // 2
    _call(
        "rope_and_store", qkv, cos, sin, slots, key_cache, value_cache, tokens, num_heads, groups, head_dim
    )  # fmt: skip


def attention(
    qkv: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    sinks: torch.Tensor,
    metadata: CpuAttentionMetadata,
    scale: float,
) -> torch.Tensor:
    """qkv [T, heads + 2 groups, D], rotated, its keys and values in the cache already -> [T, heads * D]."""
    tokens, width, head_dim = qkv.shape
    if head_dim != HEAD_DIM:
        raise ValueError(f"head_dim is {head_dim}, the native attention kernel is written for {HEAD_DIM}")
    heads = sinks.shape[0]
    out = torch.empty(tokens, heads * head_dim, dtype=qkv.dtype)
    m = metadata
    _call(
        "attention", qkv, key_cache, value_cache, sinks, out, m.slots, m.base, m.first, m.last,
        scale, tokens, heads, (width - heads) // 2,
    )  # fmt: skip
    return out


def route(logits: torch.Tensor, experts_per_token: int) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [T, E] -> (expert ids int64 [T, k], weights float32 [T, k])."""
    tokens, num_experts = logits.shape
    experts = torch.empty(tokens, experts_per_token, dtype=torch.int64)
    weights = torch.empty(tokens, experts_per_token, dtype=torch.float32)
    _call("route", logits, experts, weights, tokens, num_experts, experts_per_token)
    return experts, weights


def moe(
    x: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    w1: FirstMatrix,
    b1: torch.Tensor,
    w2: SecondMatrix,
    b2: torch.Tensor,
    residual: torch.Tensor,
    limit: float,
    lora: tuple[LayerLora, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Returns residual + the weighted sum of the experts [T, H].

    `lora`: the layer's adapters, and the slot of each row.
    """
    tokens, hidden = x.shape
    per_token, num_experts, inter = experts.shape[1], b1.shape[0], b1.shape[1] // 2
    out = torch.empty_like(x)
    parts = torch.empty(tokens * per_token, hidden, dtype=torch.float32)
    name, adapters = ("moe", ()) if lora is None else ("lora_moe", (lora[0].addresses, lora[1]))
    _call(
        name, *adapters, x, experts, weights, *matrix_parts(w1), b1, *matrix_parts(w2), b2, residual, out, parts,
        limit, tokens, per_token, num_experts, hidden, inter, *layout_of(w1),
    )  # fmt: skip
    return out


def lora_linear(
    lora: LayerLora, slots: torch.Tensor, x: torch.Tensor, out: torch.Tensor, first: Module, widths: list[int]
) -> None:
    """Adds to out [T, N] what the adapters add; each module from `first` on has so many of the columns.

    x [T, K], slots int64 [T].
    """
    assert sum(widths) == out.shape[1] and len(widths) <= NUM_MODULES - MODULES.index(first)
    _call(
        "lora_linear",
        lora.addresses,
        slots,
        x,
        out,
        MODULES.index(first),
        len(widths),
        torch.tensor(widths),
        len(x),
        x.shape[1],
    )


def decoder(
    layers: torch.Tensor,
    plans: torch.Tensor,
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    scale: float,
    limit: float,
    num_heads: int,
    num_groups: int,
    num_experts: int,
    experts_per_token: int,
    intermediate: int,
    adapters: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
) -> None:
    """Runs all layers over x [T, H] in place.

    The addresses of the layers' tensors are the rows of `layers` and `plans` (decoder.h). `adapters` int64 [S,
    NUM_MODULES, 3], of the first layer and followed by the others', and `slots` int64 [T]: in steps with adapters.
    """
    head_dim = 2 * cos.shape[-1]
    if head_dim != HEAD_DIM:
        raise ValueError(f"head_dim is {head_dim}, the kernels are written for {HEAD_DIM}")
    _call(
        "decoder", layers, plans, x, cos, sin, eps, scale, limit, layers.shape[0], *x.shape,
        num_heads, num_groups, num_experts, experts_per_token, intermediate,
        adapters, slots, 0 if adapters is None else adapters.shape[0],
    )  # fmt: skip


def settle() -> None:
    """Returns when no late thread of an earlier `decoder` call, which does not wait, reads its tensors."""
    for kernels in _loaded:
        kernels.settle()


def pick(
    logits: torch.Tensor, masks: np.ndarray, integers: list[list[int]], reals: list[list[float]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Picks a token for each row of logits float32 [R, V], which are masked in place.

    Returns (token ids int64 [R], the largest allowed logit of each row, NaN if the row has one).

    `masks` int32 [.., words]; `integers` [4][R]: the row's mask among them (-1: none), seed, position, top-k (0: off);
    `reals` [3][R]: temperature (0 is greedy), top-p, min-p.
    """
    rows, vocab = logits.shape
    ids, peaks = torch.empty(rows, dtype=torch.int64), torch.empty(rows)
    masks = np.require(masks, requirements=["C", "W"])
    tables = (np.array(integers, np.int64), np.array(reals, np.float64))
    _call(
        "pick", logits, torch.from_numpy(masks), masks.shape[1], *map(torch.from_numpy, tables), ids, peaks, rows, vocab
    )  # fmt: skip
    return ids, peaks


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    """Sets the argument types of the library's functions."""
    for name, types in ARGUMENT_TYPES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = types, None
    return library


def _call(name: str, *arguments: torch.Tensor | float | None) -> None:
    """Calls a kernel with tensors' addresses; None is a null pointer."""
    kernels = library()
    assert kernels is not None, "choose_backend takes these kernels only where they run"
    converted: list[float | None] = []
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            assert argument.is_contiguous(), f"{name}: a tensor is not contiguous"
            converted.append(argument.data_ptr())
        else:
            converted.append(argument)
    getattr(kernels, name)(*converted)


@functools.cache
def _cpu_flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    flags = next((line for line in lines if line.startswith("flags")), "")
    return frozenset(flags.partition(":")[2].split())


def _torch_openmp() -> Path:
    """torch's OpenMP library, whose path differs between builds. Raises OSError if there is none."""
    package = Path(torch.__file__).parent
    for folder in (package / "lib", package.parent / "torch.libs"):
        for path in sorted(folder.glob("libgomp*.so*")):
            return path
    raise OSError("torch brings no libgomp")


def _build(compiler: str, flags: tuple[str, ...]) -> Path:
    """The shared library, compiled now or by an earlier start."""
    options = [*COMPILE_FLAGS, *flags]
    key = hashlib.sha256(
        b"".join(path.read_bytes() for path in (SOURCE, *HEADERS)) + " ".join((compiler, *options)).encode()
    ).hexdigest()[:16]
    compile_kernels = functools.partial(_compile, compiler, options)
    return cached(default_cache_folder() / "native" / f"kernels-{key}.so", compile_kernels)


def _compile(compiler: str, options: list[str], linked: Path) -> None:
    """Compiles the kernels into `linked`. Raises CalledProcessError, or OSError if the disk is full."""
    compiled = linked.with_suffix(".o")
    run = functools.partial(subprocess.run, check=True, capture_output=True, text=True)
    try:
        run([compiler, *options, "-c", str(SOURCE), "-o", str(compiled)])
        # linked without -fopenmp: the OpenMP symbols are taken from torch's library
        run([compiler, "-shared", "-pthread", str(compiled), "-o", str(linked)])
    except subprocess.CalledProcessError as error:
        full = os.strerror(errno.ENOSPC)
        if full in error.stderr:
            raise OSError(errno.ENOSPC, full) from error
        raise
    compiled.unlink()
