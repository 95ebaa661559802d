"""The server under test: the one at --url, or one that is started with --model and --profile."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from tests.support.server_process import running_server


@pytest.fixture(scope="session")
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    given = request.config.getoption("--url")
    if given:
        yield given.rstrip("/")
        return
    model, profile = request.config.getoption("--model"), request.config.getoption("--profile")
    timeout_s = 180.0 if model == "nano" else 1800.0
    with running_server("--model", model, "--profile", profile, ready_timeout_s=timeout_s) as server:
        yield server.url


@pytest.fixture(scope="session")
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=120) as client:
        yield client


@pytest.fixture(scope="session")
def model(http: httpx.Client) -> str:
    """The id of the model that is served."""
    found: str = http.get("/v1/models").json()["data"][0]["id"]
    return found
