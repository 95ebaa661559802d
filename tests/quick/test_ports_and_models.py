from __future__ import annotations

import json
import os
import socket
import stat
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from gptoss import model_locator
from gptoss.config.errors import ConfigError
from gptoss.model_locator import locate_model
from gptoss.port_manager import PortError, owner, recorded, reserve, running_servers


def test_a_reserved_port_is_taken_and_its_owner_named() -> None:
    with reserve("127.0.0.1", 0) as held:
        port = held.getsockname()[1]
        with pytest.raises(PortError, match=rf"port {port} is in use by .*pid {os.getpid()}"):
            reserve("127.0.0.1", port)
        found = owner(port)
        assert found is not None and found.pid == os.getpid()
        with reserve("127.0.0.1", port, auto=True) as other:
            assert port < other.getsockname()[1] <= port + 100
    reserve("127.0.0.1", port).close()


def test_ipv6_and_bad_hosts() -> None:
    with reserve("::1", 0) as held:
        assert held.family == socket.AF_INET6
    with pytest.raises(PortError, match="cannot bind 192.0.2.1"):
        reserve("192.0.2.1", 0)


@pytest.mark.parametrize("name", ["20b", "gpt-oss-20b", "openai/gpt-oss-20b", "gpt-oss:20b"])
def test_dummy_models_have_the_published_shape(name: str) -> None:
    located = locate_model(name, None, Path("/nowhere"), dummy=True)
    assert (located.size, located.folder, located.config.num_experts) == ("20b", None, 32)


def test_what_is_not_there_names_the_places_and_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_locator, "_hub_reachable", lambda: False)
    started = time.monotonic()
    with pytest.raises(ConfigError) as error:
        locate_model("120b", tmp_path, tmp_path)
    assert time.monotonic() - started < 5
    for part in (
        str(tmp_path / "gpt-oss-120b"),
        "models/gpt-oss-120b",
        "Hugging Face cache",
        "hf download openai/gpt-oss-120b",
    ):
        assert part in str(error.value)
    with pytest.raises(ConfigError, match="no config.json in"):
        locate_model("./not-there", None, tmp_path)
    with pytest.raises(ConfigError, match="'dummy' needs model to be one of"):
        locate_model("7b", None, tmp_path, dummy=True)


def test_a_download_that_fails_is_one_line_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def download(_: str, *, local_files_only: bool = False, **__: object) -> str:
        if local_files_only:
            raise FileNotFoundError
        raise NotADirectoryError(20, "Not a directory", "/home/.cache/huggingface/token")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(model_locator, "_hub_reachable", lambda: True)
    with pytest.raises(ConfigError, match="could not download .*Not a directory.*HF_HOME") as error:
        locate_model("20b", tmp_path, tmp_path)
    assert "\n" not in str(error.value)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary folder that other users could write to. -> where the records' folder is made."""
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    tmp_path.chmod(0o1777)
    return tmp_path / f"gpt-oss-server-{os.getuid()}"


def test_records_are_for_this_user_alone(temporary: Path) -> None:
    with reserve("127.0.0.1", 0) as held, recorded(held):
        (record,) = (temporary / "gpt-oss-server").glob("*.json")
        for path, mode in ((record, 0o600), (temporary, 0o700), (record.parent, 0o700)):
            assert stat.S_IMODE(path.stat().st_mode) == mode, path
        assert [found.port for found in running_servers()] == [held.getsockname()[1]]
    assert list(record.parent.iterdir()) == []


GOOD_RECORD = {"port": 8000, "host": "::1", "pid": 1, "started": 1.0}


@pytest.mark.parametrize(
    "damage",
    [{"port": "8000"}, {"pid": None}, {"pid": 2**80}, {"pid": -1}, {"started": "x"}, {"host": 1}, {"port": 70_000}],
)
def test_a_damaged_record_is_one_line_in_the_log(
    temporary: Path, caplog: pytest.LogCaptureFixture, damage: dict[str, Any]
) -> None:
    folder = temporary / "gpt-oss-server"
    folder.mkdir(parents=True, mode=0o700)
    temporary.chmod(0o700)
    path = folder / "8000.json"
    path.write_text(json.dumps(GOOD_RECORD | damage))
    assert running_servers() == [] and not path.exists()
    assert [str(path) in record.message for record in caplog.records] == [True]


def test_what_is_not_a_record_is_passed_over(temporary: Path) -> None:
    folder = temporary / "gpt-oss-server"
    (folder / "1.json").mkdir(parents=True)
    for path in (temporary, folder):
        path.chmod(0o700)
    os.mkfifo(folder / "2.json")
    (folder / "3.json").write_text("[" * 100_000)
    assert running_servers() == []


@pytest.mark.parametrize("which", ["outer", "inner"])
@pytest.mark.parametrize("fault", ["link", "dangling link", "mode 777", "mode 720", "file"])
def test_a_folder_of_records_that_others_can_write_is_refused(
    temporary: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, which: str, fault: str
) -> None:
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "gpt-oss-server").mkdir(parents=True, mode=0o700)
    folder = temporary if which == "outer" else temporary / "gpt-oss-server"
    folder.parent.mkdir(mode=0o700, exist_ok=True)
    if "link" in fault:
        folder.symlink_to(tmp_path / "nothing" if "dangling" in fault else elsewhere)
    elif fault == "file":
        folder.touch(0o600)
    else:
        (temporary / "gpt-oss-server").mkdir(parents=True)
        folder.chmod(int(fault.removeprefix("mode "), 8))
    with reserve("127.0.0.1", 0) as held:
        port = held.getsockname()[1]
        planted = json.dumps(
            {"port": port, "host": "127.0.0.1", "pid": os.getpid(), "started": psutil.Process().create_time()}
        )
        for place in (elsewhere, temporary):
            if (place / "gpt-oss-server").is_dir():
                (place / "gpt-oss-server" / f"{port}.json").write_text(planted)
        with recorded(held):
            assert "cannot write the record of this server" in caplog.text
        with pytest.raises(PortError, match="not one of our servers"):
            reserve("127.0.0.1", port, force=True)
        with pytest.raises(PortError, match="server records are not kept in"):
            running_servers()
        assert not (tmp_path / "nothing").exists()
        for place in (elsewhere, temporary):
            if (place / "gpt-oss-server").is_dir():
                assert (place / "gpt-oss-server" / f"{port}.json").read_text() == planted, "left alone"


def test_a_folder_of_another_user_is_refused(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (temporary / "gpt-oss-server").mkdir(parents=True, mode=0o700)
    owner_id = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: owner_id + 1)
    temporary.rename(temporary.with_name(f"gpt-oss-server-{owner_id + 1}"))
    with pytest.raises(PortError, match=f"belongs to user {owner_id}"):
        running_servers()


def test_a_record_replaces_a_link_and_does_not_follow_it(temporary: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    folder = temporary / "gpt-oss-server"
    folder.mkdir(parents=True, mode=0o755)
    temporary.chmod(0o755)  # as earlier versions made them
    with reserve("127.0.0.1", 0) as held:
        port = held.getsockname()[1]
        (folder / f"{port}.json").symlink_to(victim)
        (folder / f".{port}.json.{os.getpid()}").symlink_to(victim)
        with recorded(held):
            assert [found.port for found in running_servers()] == [port]
    assert victim.read_text() == "precious"
    assert {stat.S_IMODE(path.stat().st_mode) for path in (temporary, folder)} == {0o700}
