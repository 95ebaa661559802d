"""What the sandbox is made of, without starting one."""

from __future__ import annotations

import errno
import struct

import pytest

from gptoss.tools.python_sandbox.output import BoundedOutput
from gptoss.tools.python_sandbox.pipes import CellOutput
from gptoss.tools.python_sandbox.runner import code_of, python_namespace
from gptoss.tools.python_sandbox.seccomp import filter_program

ALLOW, KILL, DENIED = 0x7FFF0000, 0x80000000, 0x50000
X86, ARM = 0xC000003E, 0xC00000B7
CLONE_THREAD, NEW_USER = 0x3D0F00, 0x10000000


def decide(machine: str, architecture: int, number: int, argument: int = 0) -> int:
    """What the filter returns for a system call: classic BPF, as far as the filter uses it."""
    program = filter_program(machine)
    assert program is not None
    code = [*struct.iter_unpack("=HBBI", program)]
    data, value, at = {0: number, 4: architecture, 16: argument}, 0, 0
    while True:
        operation, if_true, if_false, operand = code[at]
        at += 1
        if operation == 0x06:
            return int(operand)
        if operation == 0x20:
            value = data[operand]
        else:
            holds = {0x15: value == operand, 0x35: value >= operand, 0x45: bool(value & operand)}[operation]
            at += if_true if holds else if_false


@pytest.mark.parametrize(
    ("number", "argument", "wanted"),
    [
        (0, 0, ALLOW),  # read
        (59, 0, ALLOW),  # execve
        (105, 0, ALLOW),  # setuid, for the driver
        (56, CLONE_THREAD, ALLOW),
        (56, NEW_USER, DENIED | errno.EPERM),
        (435, 0, DENIED | errno.ENOSYS),  # clone3: the C library falls back to clone
        (272, 0, DENIED | errno.EPERM),  # unshare
        (319, 0, DENIED | errno.EPERM),  # memfd_create
        (425, 0, DENIED | errno.EPERM),  # io_uring_setup
        (41, 1, ALLOW),  # a unix socket
        (41, 2, ALLOW),
        (41, 40, DENIED | errno.EAFNOSUPPORT),  # vsock
        (41, 17, DENIED | errno.EAFNOSUPPORT),  # packet
        (0x40000000, 0, DENIED | errno.ENOSYS),  # x32
        (42, 40, ALLOW),  # connect, whose argument is no family
    ],
)
def test_the_filter_decides_by_call_and_argument(number: int, argument: int, wanted: int) -> None:
    assert decide("x86_64", X86, number, argument) == wanted


def test_the_filter_of_the_other_architecture() -> None:
    assert decide("aarch64", ARM, 97) == decide("aarch64", ARM, 220, NEW_USER) == DENIED | errno.EPERM
    assert (
        decide("aarch64", ARM, 63)
        == decide("aarch64", ARM, 220, CLONE_THREAD)
        == decide("aarch64", ARM, 198, 2)
        == ALLOW
    )
    assert decide("aarch64", ARM, 198, 40) == DENIED | errno.EAFNOSUPPORT
    assert decide("x86_64", ARM, 0) == decide("aarch64", X86, 0) == KILL
    assert filter_program("riscv64") is None


@pytest.mark.parametrize("step", [1, 3, 7, 1000])
def test_output_keeps_its_beginning_and_its_end(step: int) -> None:
    kept, data = BoundedOutput(20), b"0123456789" * 10
    for start in range(0, len(data), step):
        kept.add(data[start : start + step])
    assert kept.text() == "0123456789\n[... 80 bytes left out ...]\n0123456789"
    assert kept.total == 100


def test_output_that_fits_is_whole_and_a_cut_character_is_left_out() -> None:
    kept = BoundedOutput(20)
    kept.add("äöü".encode())
    assert kept.text() == "äöü"
    cut = BoundedOutput(6)
    cut.add("aäöüß€".encode())
    assert cut.text() == "aä\n[... 6 bytes left out ...]\n€"


@pytest.mark.parametrize("step", [1, 2, 5, 100])
def test_a_cells_output_ends_at_its_mark(step: int) -> None:
    output, data = CellOutput(1000), b"first<m" + b"ark>" + b"later"
    output.begin("<mark>")
    for start in range(0, len(data), step):
        assert not output.complete.is_set() or start > len(b"first<mark>") - step
        output.feed(data[start : start + step])
    assert output.complete.is_set() and output.text() == "first"
    output.begin("<next>")
    output.feed(b" and<next>")
    assert output.text() == "later and"


def test_a_cell_without_an_end_shows_what_there_is() -> None:
    output = CellOutput(1000)
    output.begin("<mark>")
    output.feed(b"half a mark <ma")
    assert output.text() == "half a mark <ma" and not output.complete.is_set()
    output.begin("<mark>")
    output.feed(b"x" * (16 * 2**20 + 10))
    assert output.flooded.is_set()


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("print(1)\n", "print(1)\n"),
        ("```python\nprint(1)\n```", "print(1)"),
        ("```\nprint(1)\nprint(2)\n```\n", "print(1)\nprint(2)"),
        ('{"code": "print(1)"}', "print(1)"),
        ('{"code": "print(1)", "x": 1}', '{"code": "print(1)", "x": 1}'),
        ("{1, 2}", "{1, 2}"),
    ],
)
def test_the_code_of_a_call(text: str, code: str) -> None:
    assert code_of(text) == code


def test_the_model_is_told_the_limits() -> None:
    text = python_namespace(30).description or ""
    assert "30.0 seconds" in text and "disabled" in text and "120.0" not in text and "UNKNOWN" not in text
