"""The sandbox of the Python tool, from inside: what cells can do, and what they cannot."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from gptoss.tools.python_sandbox import container, probe
from gptoss.tools.python_sandbox.container import Container
from gptoss.tools.python_sandbox.errors import SandboxError
from tests.support.sandbox import LIMITS, Box, box, machine_sandbox
from tests.support.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]
GONE = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)


@pytest.fixture(scope="module")
def shared() -> Iterator[Box]:
    """A container for cells that leave nothing behind."""
    with box() as made:
        yield made


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() not in GONE
    except psutil.NoSuchProcess:
        return False


# --- an interpreter with state ---


def test_cells_share_their_state_and_show_the_last_value(shared: Box) -> None:
    assert shared.text("x = 20\nprint('one')\nx + 1") == "one\n21"
    assert shared.text("import math\ndef f(y):\n    return x * y\n") == ""
    assert shared.text("f(2)") == "40"
    assert shared.text("_ + 2; None") == "" and shared.text("_") == "40"
    assert shared.text("'é☺'") == "'é☺'"
    assert shared.text("x = 3;") == "" and shared.text("# nothing") == "" and shared.text("") == ""
    assert shared.text("await __import__('asyncio').sleep(0, 'awaited')") == "'awaited'"
    assert shared.text("!echo from the shell") == "from the shell"
    assert shared.text("import os\nos.system('echo child >&2'); print(__name__)") == "child\n__main__"
    shared.run("open('module_of_mine.py', 'w').write('value = 7')")
    assert shared.text("import module_of_mine\nmodule_of_mine.value") == "7"


def test_an_error_shows_the_line_and_keeps_the_state(shared: Box) -> None:
    shared.run("kept = 1")
    broken = shared.run("def g():\n    return 1 / 0\ng()")
    assert (broken.status, broken.detail) == ("error", "ZeroDivisionError: division by zero")
    assert "return 1 / 0" in broken.text and "driver.py" not in broken.text
    assert "SyntaxError" in shared.run("def").text
    assert shared.run("raise SystemExit(3)").detail == "SystemExit: 3"
    assert shared.run("input()").detail.startswith("EOFError")
    assert shared.text("kept") == "1"


def test_a_cell_at_its_time_limit_is_interrupted_and_the_state_kept(shared: Box) -> None:
    shared.run("kept = 2")
    late = shared.run("print('begun')\nimport time\ntime.sleep(60)", 0.3)
    assert late.status == "timeout" and "0.3 s" in late.detail and late.text.startswith("begun\n")
    assert shared.text("kept") == "2"


def test_a_cancelled_cell_is_interrupted(shared: Box) -> None:
    async def cancelled() -> None:
        task = asyncio.create_task(shared.container.run("import time\nbefore = 1\ntime.sleep(60)", 60))
        await asyncio.sleep(0.3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    shared.runner.run(cancelled())
    assert shared.text("before") == "1"


def test_images(shared: Box) -> None:
    fake = "class P:\n    def _repr_png_(self): return b'png'\ndisplay(P())\nP()"
    assert [(one.data, one.media_type) for one in shared.run(fake).images] == [(b"png", "image/png")] * 2
    many = shared.run("for _ in range(40): display(P())")
    assert len(many.images) == 16 and "only the first 16" in many.text
    assert shared.run("class Broken:\n    def _repr_png_(self): 1 / 0\nBroken").images == []


def test_plots_come_back_as_images() -> None:
    with box(disk_bytes=32 * 2**20) as plotting:
        shown = plotting.run("import matplotlib.pyplot as plt\nplt.plot([1, 2, 3])\nplt.show()\nprint('after')")
        assert shown.status == "ok", shown.text
        assert [image.data[:8] for image in shown.images] == [b"\x89PNG\r\n\x1a\n"] and shown.text.endswith("after\n")
        assert len(plotting.run("plt.figure(); plt.figure(); None").images) == 2
        assert plotting.run("1").images == []
        assert len(plotting.run("fig, ax = plt.subplots()\nfig").images) == 1


# --- files ---


def test_files_of_this_machine_are_not_there(shared: Box, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    outside = [str(tmp_path / "secret"), "/etc/shadow", "/etc/hostname", "/home", "/var", str(ROOT / "pyproject.toml")]
    assert shared.text(f"import os\n[p for p in {outside!r} if os.path.exists(p)]") == "[]"
    assert shared.text("os.getcwd(), os.getuid(), os.path.expanduser('~')") == "('/mnt/data', 1000, '/mnt/data')"
    places = [
        "/x",
        "/usr/x",
        "/dev/x",
        "/etc/x",
        "/run/sandbox/driver.py",
        "/proc/sys/kernel/core_pattern",
        sys.prefix + "/x",
    ]
    for place in places:
        failed = shared.run(f"open({place!r}, 'w')")
        assert failed.status == "error" and "OSError" in failed.detail or "Permission" in failed.detail, place
    assert (
        shared.text("open('/tmp/x', 'w').write('a'), open('y', 'w').write('b'), open('/dev/null').read()")
        == "(1, 1, '')"
    )


def test_disks_are_bounded(shared: Box) -> None:
    for place in ("/mnt/data/f", "/tmp/f", "/dev/shm/f"):
        wrote = shared.run(
            f"import os\nf = open({place!r}, 'wb', 0)\ntry:\n    while True: f.write(bytes(2**19))\nfinally:\n    os.unlink({place!r})"
        )
        assert "File too large" in wrote.detail or "No space left" in wrote.detail, place
    many = "fs = []\ntry:\n    for i in range(9): fs.append(open(f'/dev/shm/{i}', 'wb', 0)); fs[-1].write(bytes(2**20))\nfinally:\n    [os.unlink(f.name) for f in fs]; fs.clear()"
    wrote = shared.run(many + "\nlen(fs)")
    assert "No space left" in wrote.detail or shared.text(
        "os.statvfs('/dev/shm').f_blocks * os.statvfs('/dev/shm').f_frsize"
    ) == str(LIMITS.disk_bytes)


def test_memory_that_no_limit_counts_is_refused(shared: Box) -> None:
    assert "Operation not permitted" in shared.run("os.memfd_create('x')").detail
    assert shared.text("import ctypes\nctypes.CDLL(None, use_errno=True).shmget(0, 2**30, 0o1600)") == "-1"


def test_nothing_of_the_servers_process_is_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTOSS_API_KEY", "secret-of-the-server")
    with box() as fresh:
        assert "secret" not in fresh.text("import os\nprint(dict(os.environ), open('/proc/1/environ').read())")
        assert fresh.text("[p for p in os.listdir('/proc') if p.isdigit()]") == "['1', '2']"
        assert "Operation not permitted" in fresh.text("!unshare --user true; unshare --net true; chroot / true")
        assert fresh.text("open('/proc/self/status').read().split('CapEff:')[1].split()[0]") == repr("0" * 16)
        assert "PermissionError" in fresh.text("os.kill(1, 9); os.setuid(0)")


# --- network ---


def test_there_is_no_network(shared: Box) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        for address in (("127.0.0.1", server.getsockname()[1]), ("192.0.2.1", 80)):
            tried = shared.run(f"import socket\nsocket.create_connection({address!r}, 1)")
            assert tried.detail.startswith(("ConnectionRefusedError", "OSError: [Errno 101]")), tried
    assert "gaierror" in shared.run("socket.getaddrinfo('example.com', 80)").detail
    for family in ("AF_VSOCK", "AF_PACKET", "AF_ALG"):
        assert "OSError" in shared.run(f"socket.socket(socket.{family}, socket.SOCK_STREAM)").detail


# --- processes, memory, output ---


def test_processes_are_bounded() -> None:
    fork = "import subprocess\nps = []\ntry:\n    for _ in range(200): ps.append(subprocess.Popen(['sleep', '60']))\nexcept OSError as e: print(e)\nlen(ps)"
    with box() as crowded:
        refused, count = crowded.text(fork).split("\n")
        assert "Resource temporarily unavailable" in refused and 10 <= int(count) <= LIMITS.processes
        assert len(crowded.processes()) <= LIMITS.processes + 3
        threads = "import threading\nfor _ in range(200): threading.Thread(target=threading.Event().wait, daemon=True).start()"
        assert "can't start new thread" in crowded.run(threads).detail


def test_memory_of_one_process(shared: Box) -> None:
    assert shared.run("b = bytearray(2**30)").detail == "MemoryError"
    assert shared.text("1") == "1"


def test_memory_of_many_processes() -> None:
    hold = "import os, time\nfor _ in range(8):\n    if os.fork() == 0:\n        b = b'x' * (200 * 2**20); time.sleep(60); os._exit(0)\ntime.sleep(30)"
    with box() as greedy:
        ended = greedy.run(hold)
        assert ended.status == "memory" and "512 MiB" in ended.detail
        assert not greedy.container.is_alive
        assert greedy.run("1").status == "ended"


def test_long_output_keeps_its_beginning_and_its_end(shared: Box) -> None:
    text = shared.text("print('begin' + 'x' * 100_000 + 'end')")
    assert text.startswith("begin") and text.endswith("end") and len(text) < 2100 and "98009 bytes left out" in text
    flood = shared.run("while True: print('y' * 1000)")
    assert flood.status == "output" and len(flood.text) < 2100
    assert shared.text("2") == "2"


# --- what is left behind, and what does not keep to the rules ---


def test_children_are_stopped_between_cells_and_end_with_the_container() -> None:
    with box() as parent:
        leave = "import subprocess\np = subprocess.Popen('(setsid sleep 300 &) ; sleep 300', shell=True)\nimport time; time.sleep(0.7); print('left')"
        assert parent.text(leave) == "left"
        left = [one for one in parent.processes() if one.name() == "sleep"]
        wait_until(lambda: {one.status() for one in left} == {psutil.STATUS_STOPPED})
        assert len(left) == 2
        everyone = parent.processes()
        assert parent.text("p.poll()") == ""
        parent.runner.run(parent.container.close())
        assert not [one for one in everyone if is_running(one.pid)]


@pytest.mark.parametrize(
    "code",
    [
        "import os; os._exit(3)",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'\\xff' * 100)\n    except OSError: pass\nimport time; time.sleep(9)",
        "import os\nfor _ in range(99):\n    for fd in range(3, 64):\n        try: os.write(fd, b'\\0\\0\\0\\x02{}')\n        except OSError: pass\nimport time; time.sleep(9)",
        "import os\nos.closerange(0, 50)",
        "import ctypes; ctypes.string_at(0)",
    ],
    ids=["exit", "kill", "forged", "flood", "closed", "crash"],
)
def test_a_cell_that_breaks_the_interpreter_ends_its_container(code: str) -> None:
    with box() as broken:
        ended = broken.run(code, 5)
        assert ended.status == "ended" and "variables and files are lost" in ended.detail
        assert not broken.container.is_alive


def test_a_cell_that_ignores_the_interrupt_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container, "INTERRUPT_S", 0.3)
    with box() as stubborn:
        everyone = stubborn.processes()
        code = "import time\nwhile True:\n    try: time.sleep(60)\n    except KeyboardInterrupt: pass"
        ended = stubborn.run(code, 0.2)
        assert ended.status == "timeout" and "The container was ended" in ended.detail
        assert not [one for one in everyone if is_running(one.pid)]


def test_a_cell_that_cannot_be_stopped_in_time_makes_its_container_useless(monkeypatch: pytest.MonkeyPatch) -> None:
    async def left_twice() -> None:
        task = asyncio.create_task(made.container.run(code, 60))
        await asyncio.sleep(0.3)
        for _ in range(2):  # the second one while the cell is being interrupted
            task.cancel()
            await asyncio.sleep(0.1)
        await asyncio.wait({task})

    code = "import time\nwhile True:\n    try: time.sleep(60)\n    except KeyboardInterrupt: pass"
    with box() as made:
        made.runner.run(left_twice())
        assert not made.container.is_alive and made.run("1").status == "ended"


@pytest.mark.parametrize("delay_s", [0.0, 0.005, 0.03, 0.1])
def test_a_start_that_is_cancelled_leaves_nothing_behind(delay_s: float) -> None:
    sandbox = machine_sandbox()

    async def cancelled() -> None:
        task = asyncio.create_task(Container.start(sandbox, LIMITS))
        await asyncio.sleep(delay_s)
        task.cancel()
        await asyncio.wait({task})
        if not task.cancelled():  # it was faster
            await task.result().close()
        for _ in range(200):
            if not others():
                return
            await asyncio.sleep(0.02)

    before = {one.pid for one in psutil.Process().children(recursive=True)}
    others = lambda: [one for one in psutil.Process().children(recursive=True) if one.pid not in before]  # noqa: E731
    asyncio.run(cancelled())
    assert not others()


HOLDER = """
import asyncio, sys, time
from gptoss.tools.python_sandbox.container import Container
from tests.support.sandbox import LIMITS, machine_sandbox
async def main():
    container = await Container.start(machine_sandbox(), LIMITS)
    await container.run("import subprocess; subprocess.Popen(['sleep', '300'])", 9)
    print(container._process.pid, flush=True)
    await container.run("import time; time.sleep(300)", 300)
asyncio.run(main())
"""


def test_containers_end_with_a_server_that_is_killed() -> None:
    machine_sandbox()
    holder = subprocess.Popen([sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, cwd=ROOT, text=True)
    assert holder.stdout is not None
    outside = psutil.Process(int(holder.stdout.readline()))
    everyone = [outside, *outside.children(recursive=True)]
    assert len(everyone) >= 4
    holder.kill()
    holder.wait()
    holder.stdout.close()
    wait_until(lambda: not [one for one in everyone if is_running(one.pid)])


# --- machines without ---


def _fake_bubblewrap(folder: Path, message: str) -> None:
    (folder / "bwrap").write_text(f"#!/bin/sh\necho 'bwrap: {message}' >&2\nexit 1\n")
    (folder / "bwrap").chmod(0o755)


@pytest.mark.parametrize(
    ("setting", "value", "remedy"),
    [
        ("_DEBIAN", "0", "sysctl -w kernel.unprivileged_userns_clone=1"),
        ("_COUNT", "0", "sysctl -w user.max_user_namespaces=10000"),
        ("_UBUNTU", "1", "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0"),
        (None, "", "allow them for the server's user"),
    ],
)
def test_where_user_namespaces_are_forbidden_the_reason_and_the_remedy_are_named(
    setting: str | None, value: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fake_bubblewrap(tmp_path, "No permissions to create a new namespace")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for name in ("_DEBIAN", "_COUNT", "_UBUNTU"):
        file = tmp_path / name
        if name == setting:
            file.write_text(value + "\n")
        monkeypatch.setattr(probe, name, file)
    monkeypatch.setattr(probe, "_CONTAINERS", ())
    with pytest.raises(SandboxError) as raised:
        probe.find_sandbox()
    assert "user namespaces are not allowed here" in raised.value.reason and remedy in raised.value.remedy


def test_without_bubblewrap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SandboxError, match="bwrap.* is not installed; apt-get install bubblewrap"):
        probe.find_sandbox()


def test_an_interpreter_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fake_bubblewrap(tmp_path, "unused")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(SandboxError, match="is not a Python interpreter that runs here"):
        probe.find_sandbox(tmp_path / "bwrap")


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user, which only root can")
def test_an_unprivileged_server_has_the_same_sandbox() -> None:
    machine_sandbox()
    code = "import os; print(os.getuid(), os.path.exists('/etc/shadow')); open('/dev/x', 'w')"
    script = f"""
import asyncio, sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from gptoss.tools.python_sandbox.container import Container
from gptoss.tools.python_sandbox.limits import SandboxLimits
from gptoss.tools.python_sandbox.probe import find_sandbox
async def main():
    container = await Container.start(find_sandbox(), SandboxLimits())
    print((await container.run({code!r}, 9)).text)
    await container.close()
asyncio.run(main())
"""
    python = "/usr/bin/python3"
    version = subprocess.run(
        [python, "-c", "import sys; print(sys.version_info >= (3, 11))"], capture_output=True, text=True
    )
    if version.stdout.strip() != "True" or not os.access(ROOT.parent, os.X_OK) or not ROOT.stat().st_mode & 0o005:
        pytest.skip("no Python 3.11 or checkout that another user can read")
    done = subprocess.run(
        [python, "-B", "-c", script], user=12345, group=12345, extra_groups=[], capture_output=True, text=True
    )
    assert done.stdout.startswith("1000 False\n") and "Read-only file system" in done.stdout, done


def test_ctrl_c_in_the_servers_terminal_is_not_for_containers() -> None:
    with box() as made:
        assert os.getsid(made.container._process.pid) != os.getsid(0)
        assert os.getpgid(made.container._process.pid) != os.getpgid(0)


def test_two_containers_share_nothing() -> None:
    sandbox = machine_sandbox()

    async def both() -> list[str]:
        one, other = await asyncio.gather(Container.start(sandbox, LIMITS), Container.start(sandbox, LIMITS))
        try:
            await one.run("open('/tmp/f', 'w').write('x'); a = 1", 9)
            return [(await other.run(code, 9)).text for code in ("import os; os.path.exists('/tmp/f')", "a")]
        finally:
            await asyncio.gather(one.close(), other.close())

    exists, name = asyncio.run(both())
    assert exists == "False\n" and "NameError" in name
