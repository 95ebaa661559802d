"""Compiles Triton kernels for any NVIDIA GPU on a machine without one, and reads the result.

triton contains ptxas and cuobjdump. Pointers and integers that are multiples of 16 at run time must be declared so,
otherwise the compiler emits no wide loads.
"""

from __future__ import annotations

import collections
import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
MMA_OPS = ("HMMA", "HGMMA", "UTCHMMA", "UTCQMMA", "UTCMMA")
# bytes of shared memory that one block may use: CUDA programming guide, table "Technical specifications per compute
# capability"
SHARED_BYTES = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
TARGETS = (80, 89, 90, 100, 120)


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel as the model launches it."""

    name: str
    kernel: Any
    signature: dict[str, str]  # run-time arguments: "*bf16", "i32", "fp32", ...
    constexprs: dict[str, Any]
    warps: int
    weights_per_iteration: int = 0  # weights that a program multiplies in one round of its loop; 0: not counted
    mma: bool = True
    pdl: bool = True


@dataclass(frozen=True, slots=True)
class Compiled:
    registers: int
    spilled_bytes: int
    shared_bytes: int
    loop_instructions: int
    wide_loads: int
    mma: int
    instructions: int = 0  # of the whole program
    ordinary: int = 0  # of these, what a program executes that is not the last to finish
    early_bytes: int = 0  # that a warp asks for before it waits for the kernel before
    ops: collections.Counter[str] = field(default_factory=collections.Counter)

    def longest(self, rounds: int, *, last: bool = False) -> int:
        """Instructions of a warp that goes `rounds` times through the main loop, at most. `last`: of the last program
        to finish, which adds what the others left."""
        straight = self.instructions if last else self.ordinary
        return straight + (rounds - 1) * self.loop_instructions if self.loop_instructions and rounds else straight

    def per_weight(self, case: Case) -> float:
        """SASS instructions a weight in the main loop, by warp as the issue slots count them, times 32 lanes."""
        return self.loop_instructions * 32 * case.warps / case.weights_per_iteration


def cross_compile(case: Case, capability: int) -> Compiled:
    constexprs = dict(case.constexprs)
    names = case.kernel.arg_names
    if "PDL" in names:
        constexprs["PDL"] = case.pdl and capability >= 90
    signature = {n: "constexpr" if n in constexprs else case.signature[n] for n in names}
    divisible = [i for i, n in enumerate(names) if signature[n].startswith("*")]
    source = ASTSource(
        fn=case.kernel,
        signature=signature,
        constexprs=constexprs,
        attrs={(i,): [["tt.divisibility", 16]] for i in divisible},
    )
    options: dict[str, Any] = {"num_warps": case.warps}
    if constexprs.get("PDL"):
        options["launch_pdl"] = True
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return _read(made)


def _read(made: Any) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([CUOBJDUMP, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    prefix = r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?"
    code = [(int(a, 16), op) for a, op in re.findall(prefix + r"([A-Z][\w.]*)", sass)]
    branches = re.findall(prefix + r"BRA(?:\.\w+)*\s+(?:!?U?P\w+,\s*)?(?:`\(\S+\)|0x([0-9a-f]+))", sass)
    loops = [(int(target, 16), int(at, 16)) for at, target in branches if target and int(target, 16) < int(at, 16)]
    body = _main_loop(code, loops)
    everywhere = [op for _, op in code if op != "NOP"]
    return Compiled(
        registers=int(_found(r"REG:(\d+)", usage)),
        spilled_bytes=int(_found(r"STACK:(\d+)", usage)),
        shared_bytes=made.metadata.shared,
        loop_instructions=len(body),
        wide_loads=sum(op.startswith(("LDG", "LDGSTS")) and (".128" in op or ".64" in op) for op in everywhere),
        mma=sum(op.split(".")[0] in MMA_OPS for op in everywhere),
        instructions=len(everywhere),
        ordinary=_until_exit(everywhere),
        early_bytes=_early_bytes(everywhere),
        ops=collections.Counter(op.split(".")[0] for op in body),
    )


def _until_exit(ops: list[str]) -> int:
    """Up to the first exit after the atomic addition by which the last program finds out that it is."""
    counted = next((i for i, op in enumerate(ops) if op.startswith("ATOMG")), None)
    if counted is None:
        return len(ops)
    return next((i + 1 for i in range(counted, len(ops)) if ops[i] == "EXIT"), len(ops))


def _early_bytes(ops: list[str]) -> int:
    """Loads by their width, prefetches by a line a lane."""
    wait = next((i for i, op in enumerate(ops) if op.startswith("ACQBULK")), 0)
    lanes, found = 32, 0
    for op in ops[:wait]:
        if op.startswith("CCTL") and "PF" in op:
            found += lanes * 128
        elif op.startswith("LDG"):
            widths = {".128": 16, ".64": 8, ".U16": 2, ".U8": 1}
            found += lanes * next((n for name, n in widths.items() if name in op), 4)
    return found


def _main_loop(code: list[tuple[int, str]], loops: list[tuple[int, int]]) -> list[str]:
    """The longest backward branch's body that multiplies matrices, or the longest at all."""
    bodies = [[op for a, op in code if low <= a <= high] for low, high in loops]
    multiplying = [b for b in bodies if any(op.split(".")[0] in MMA_OPS for op in b)]
    return max(multiplying or bodies, key=len, default=[])


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    assert match is not None, f"cuobjdump says nothing of {pattern}"
    return match[1]
