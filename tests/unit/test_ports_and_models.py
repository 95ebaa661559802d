from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import pytest

from src import model_locator
from src.engine.config import ConfigError
from src.model_locator import locate_model
from src.port_manager import PortError, owner, reserve
from tests.helpers import checkpoint


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


def test_a_folder_is_recognised_by_its_shape() -> None:
    located = locate_model(str(checkpoint()), None, Path("/nowhere"))
    assert (located.size, located.name, located.folder) == ("nano", "gpt-oss-nano", checkpoint())
    original = locate_model(str(checkpoint(layout="original")), None, Path("/nowhere"))
    assert original.size == "nano"
    assert locate_model(str(checkpoint(experts="bf16")), None, Path("/nowhere")).size == "nano"


@pytest.mark.parametrize("name", ["20b", "gpt-oss-20b", "openai/gpt-oss-20b", "gpt-oss:20b"])
def test_dummy_models_have_the_published_shape(name: str) -> None:
    located = locate_model(name, None, Path("/nowhere"), dummy=True)
    assert (located.size, located.folder, located.config.num_experts) == ("20b", None, 32)


def test_a_named_model_is_found_below_model_path(tmp_path: Path) -> None:
    (tmp_path / "gpt-oss-20b").symlink_to(checkpoint())
    assert locate_model("20b", tmp_path, Path("/nowhere")).folder == checkpoint().resolve()


def test_what_is_not_there_names_the_places_and_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
