"""Six tags say what is loaded, and say the same everywhere: /health, /stats, each metric, each answer."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).resolve().parents[2]
TAGS = ("model_id", "model_size", "dtype", "gpu_mode", "prompt_version", "profile")


@pytest.fixture(scope="module")
def tags(http: httpx.Client) -> dict[str, str]:
    health = http.get("/health").json()
    return {name: health[name] for name in TAGS}


def ask(http: httpx.Client, model: str, **more: Any) -> dict[str, Any]:
    request = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4} | more
    response = http.post("/v1/chat/completions", json=request)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_the_tags_are_of_what_is_loaded(
    http: httpx.Client, tags: dict[str, str], request: pytest.FixtureRequest
) -> None:
    engine = http.get("/stats").json()["engine"]
    assert tags["dtype"] == engine["dtype"] != "auto"
    assert tags["gpu_mode"] == engine["gpu_mode"] != "auto"
    assert tags["gpu_mode"] in ("cpu", "single", "pipeline", "tensor", "tensor+pipeline")
    assert (tags["gpu_mode"] == "cpu") <= (engine["device"] == "cpu")
    assert len(engine["ranks"]) == 1 or tags["gpu_mode"] not in ("cpu", "single")
    assert tags["model_id"] == http.get("/v1/models").json()["data"][0]["id"]
    if not request.config.getoption("--url"):
        assert tags["model_size"] == request.config.getoption("--model")
        assert tags["profile"] == request.config.getoption("--profile")


def test_health_and_stats_agree(http: httpx.Client, tags: dict[str, str]) -> None:
    stats = http.get("/stats").json()
    assert {name: stats[name] for name in TAGS} == tags


def test_answers_carry_them(http: httpx.Client, model: str, tags: dict[str, str]) -> None:
    assert ask(http, model)["metadata"] == tags


def test_streams_carry_them(http: httpx.Client, model: str, tags: dict[str, str]) -> None:
    request = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "stream": True}
    with http.stream("POST", "/v1/chat/completions", json=request) as response:
        lines = [line for line in response.iter_lines() if line.startswith("data: {")]
    found = [chunk["metadata"] for chunk in map(json.loads, (line[6:] for line in lines)) if "metadata" in chunk]
    assert found == [tags]


def test_metrics_are_labelled_with_them(http: httpx.Client, model: str, tags: dict[str, str]) -> None:
    ask(http, model)
    families = list(text_string_to_metric_families(http.get("/metrics").text))
    ours = [f for f in families if f.name.startswith("gptoss_")]
    assert len(ours) > 15
    for family in ours:
        for sample in family.samples:
            assert {name: sample.labels.get(name) for name in TAGS} == tags, sample.name


def test_a_request_may_take_another_profile(http: httpx.Client, model: str, tags: dict[str, str]) -> None:
    for name in ("latency_first", "balanced", "quality_first"):
        for answer in (ask(http, model, profile=name), ask(http, f"{model}:{name}")):
            assert answer["metadata"] == tags | {"profile": name}, "the loaded model stays"
    refused = http.post(
        "/v1/chat/completions", json={"model": model, "messages": [{"role": "user", "content": "x"}], "profile": "fast"}
    )
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "profile"


def test_a_profile_sets_the_effort_and_the_request_beats_it(http: httpx.Client, model: str) -> None:
    def prompt(**more: Any) -> list[int]:
        body = {"model": model, "messages": [{"role": "user", "content": "Hi"}]} | more
        ids: list[int] = http.post("/tokenize", json=body).json()["tokens"]
        return ids

    efforts = {"latency_first": "low", "balanced": "medium", "quality_first": "high"}
    for name, effort in efforts.items():
        assert prompt(profile=name) == prompt(reasoning_effort=effort)
        assert prompt(profile=name, reasoning_effort="low") == prompt(reasoning_effort="low")
    assert prompt(profile="latency_first") != prompt(profile="quality_first")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from tests.p0.script import run

    run(__file__)
