"""Makes the seccomp filter of the sandbox, which refuses system calls that Python does not need.

They are: new namespaces and mounts, other processes' memory, memory that no limit counts (memfd, System V), keys,
io_uring, kernel modules, and sockets of families that a network namespace does not confine (vsock among them).
Sources: linux/seccomp.h, linux/filter.h, asm/unistd_64.h, asm-generic/unistd.h.
"""

from __future__ import annotations

import platform
import struct
from collections.abc import Iterator
from errno import EAFNOSUPPORT, ENOSYS, EPERM

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_NUMBER, _ARCH, _FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data; the argument's low word
_NEW_NAMESPACE = 0x7E020000  # the CLONE_NEW* flags of clone
_FAMILIES = (1, 2, 10, 16)  # unix, inet, inet6, netlink: all within the network namespace
_X32 = 0x40000000
_SAME_EVERYWHERE = (
    425,
    426,
    427,
    428,
    429,
    430,
    431,
    432,
    433,
    442,
    447,
)  # io_uring, mounts by descriptor, memfd_secret
# ptrace, process_vm_*, mount, umount2, pivot_root, chroot, unshare, setns, keys, bpf, perf_event_open, userfaultfd,
# memfd_create, shmget, modules, kexec_load, *_handle_at, swapon, quotactl, acct, syslog
_DENIED = {
    "x86_64": (
        *(101, 310, 311, 165, 166, 155, 161, 272, 308, 248, 249, 250, 321, 298, 323),
        *(319, 29, 175, 313, 176, 246, 303, 304, 167, 179, 163, 103),
    ),
    "aarch64": (
        *(117, 270, 271, 40, 39, 41, 51, 97, 268, 217, 218, 219, 280, 241, 282),
        *(279, 194, 105, 273, 106, 104, 264, 265, 224, 60, 89, 116),
    ),
}
_MACHINES = {"x86_64": (0xC000003E, 56, 41), "aarch64": (0xC00000B7, 220, 198)}  # architecture, clone, socket
_CLONE3 = 435
Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, operand


def filter_program(machine: str | None = None) -> bytes | None:
    """The filter for bubblewrap's --seccomp; None for a machine whose numbers are not known here."""
    machine = machine or platform.machine()
    if machine not in _MACHINES:
        return None
    return b"".join(struct.pack("=HBBI", *one) for one in _instructions(machine))


def _instructions(machine: str) -> Iterator[Instruction]:
    architecture, clone, socket = _MACHINES[machine]
    yield (_LOAD, 0, 0, _ARCH)
    yield (_EQUAL, 1, 0, architecture)
    yield (_RETURN, 0, 0, _KILL)
    yield (_LOAD, 0, 0, _NUMBER)
    yield from ((_AT_LEAST, 0, 1, _X32), (_RETURN, 0, 0, _ERRNO | ENOSYS))
    for number in (*_DENIED[machine], *_SAME_EVERYWHERE):
        yield from ((_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ERRNO | EPERM))
    yield from ((_EQUAL, 0, 1, _CLONE3), (_RETURN, 0, 0, _ERRNO | ENOSYS))  # its flags are out of a filter's sight
    yield from ((_EQUAL, 0, 3, clone), (_LOAD, 0, 0, _FIRST_ARGUMENT))
    yield from ((_ANY_BIT, 0, 2 * len(_FAMILIES) + 4, _NEW_NAMESPACE), (_RETURN, 0, 0, _ERRNO | EPERM))
    yield from ((_EQUAL, 0, 2 * len(_FAMILIES) + 2, socket), (_LOAD, 0, 0, _FIRST_ARGUMENT))
    for family in _FAMILIES:
        yield from ((_EQUAL, 0, 1, family), (_RETURN, 0, 0, _ALLOW))
    yield (_RETURN, 0, 0, _ERRNO | EAFNOSUPPORT)
    yield (_RETURN, 0, 0, _ALLOW)
