from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from gptoss import logging_setup


@pytest.fixture(autouse=True)
def root_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def test_the_addresses_of_downloads_are_not_logged() -> None:
    """The Hub's client logs each address at info, with the signature that a redirect may carry."""
    import huggingface_hub.utils._http as hub

    logging_setup.configure("info", "text")
    clients = [name for name in ("httpx", "httpx2") if hasattr(hub, name)]
    assert clients
    for name in clients:
        assert not logging.getLogger(name).isEnabledFor(logging.INFO), name
