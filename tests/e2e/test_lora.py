"""A server with LoRA adapters: chosen by `model` in every endpoint, loaded and unloaded while requests run."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from gptoss.engine.model.model_config import ModelConfig
from tests.support.adapters import DOWN, GATE_UP, ROUTER, write_adapter
from tests.support.helpers import checkpoint
from tests.support.server_process import ServerProcess, running_server
from tests.support.waiting import wait_until

KINDS: dict[str, dict[str, Any]] = {
    "attention": {},
    "experts": {"target_modules": [], "target_parameters": [GATE_UP, DOWN, ROUTER]},
    "later": {"seed": 1},
}
ENDPOINTS = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4},
    "/v1/completions": {"prompt": "Hi", "max_tokens": 4},
    "/v1/responses": {"input": "Hi", "max_output_tokens": 16},
    "/v1/messages": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, model = tmp_path_factory.mktemp("adapters"), ModelConfig.from_folder(checkpoint())
    for name, kind in KINDS.items():
        write_adapter(root / name, model, **kind)
    return root


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[ServerProcess]:
    flags = ("--cpu-kv-cache-gib", "0.1", "--lora-dir", str(folder), "--max-loras", "3", "--max-request-resumes", "2")
    adapters = [f"--lora={name}={folder / name}" for name in ("attention", "experts")]
    with running_server("--model", str(checkpoint()), *flags, *adapters) as running:
        yield running
        running.wait_idle()


def post(server: ServerProcess, path: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=body, timeout=120)


def logprobs(server: ServerProcess, model: str, **options: Any) -> list[float]:
    body = {"prompt": "One, two", "max_tokens": 8, "temperature": 0, "logprobs": 1, "ignore_eos": True} | options
    answer = post(server, "/v1/completions", model=model, **body).json()
    found: list[float] = answer["choices"][0]["logprobs"]["token_logprobs"]
    return found


def models(server: ServerProcess) -> list[str]:
    return [model["id"] for model in httpx.get(f"{server.url}/v1/models").json()["data"]]


def in_use(server: ServerProcess) -> dict[str, str]:
    for family in text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text):
        for sample in family.samples:
            if sample.name == "vllm:lora_requests_info":
                return sample.labels
    raise AssertionError("no vllm:lora_requests_info")


def test_every_endpoint_takes_an_adapter_as_its_model(server: ServerProcess) -> None:
    base, *adapters = models(server)
    assert adapters == ["attention", "experts"]
    assert httpx.get(f"{server.url}/v1/models/experts").json()["parent"] == base
    for path, body in ENDPOINTS.items():
        for name in ("attention", "experts:quality_first"):
            answer = post(server, path, model=name, **body)
            assert (answer.status_code, answer.json()["model"]) == (200, name), path
        assert post(server, path, model="later", **body).status_code == 404


def test_a_batch_of_several_adapters_gives_what_each_gives_alone(server: ServerProcess) -> None:
    names = [models(server)[0], "attention", "experts"]
    alone = [logprobs(server, name) for name in names]
    assert len({tuple(values) for values in alone}) == 3
    with ThreadPoolExecutor(12) as pool:
        mixed = list(pool.map(lambda i: logprobs(server, names[i % 3], cache_salt=str(i)), range(12)))
    assert mixed == [alone[i % 3] for i in range(12)]


def test_adapters_come_and_go_while_requests_run(server: ServerProcess) -> None:
    loaded = post(server, "/v1/load_lora_adapter", lora_name="new", lora_path="later")
    assert (loaded.status_code, loaded.text) == (200, "Success: LoRA adapter 'new' added successfully.")
    assert models(server)[1:] == ["attention", "experts", "new"]
    refused = post(server, "/v1/load_lora_adapter", lora_name="more", lora_path="later").json()["error"]
    assert refused["code"] == "invalid_adapter" and "(max_loras, --max-loras)" in refused["message"]
    with ThreadPoolExecutor(2) as pool:
        long = pool.submit(logprobs, server, "new", max_tokens=400)
        wait_until(lambda: in_use(server)["running_lora_adapters"] == "new")
        unloaded = pool.submit(post, server, "/v1/unload_lora_adapter", lora_name="new")
        wait_until(lambda: "new" not in models(server))
        assert not unloaded.done() or long.done()
        assert post(server, "/v1/completions", model="new", prompt="Hi").status_code == 404
        assert len(long.result()) == 400
        assert unloaded.result().text == "Success: LoRA adapter 'new' removed successfully."
    assert in_use(server) | {"running_lora_adapters": "", "max_lora": "3"} == in_use(server)
    assert post(server, "/v1/unload_lora_adapter", lora_name="new").status_code == 404


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"lora_name": "attention", "lora_path": "later"}, "lora_name"),
        ({"lora_name": "balanced", "lora_path": "later"}, "lora_name"),
        ({"lora_name": "x", "lora_path": "../later"}, "lora_path"),
        ({"lora_name": "x", "lora_path": "/etc"}, "lora_path"),
        ({"lora_name": "x"}, "lora_path"),
        ({"lora_name": 1, "lora_path": "later"}, "lora_name"),
    ],
)
def test_a_bad_load_names_its_field(server: ServerProcess, body: dict[str, Any], field: str) -> None:
    answer = post(server, "/v1/load_lora_adapter", **body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)


@pytest.mark.nightly
def test_a_restarted_engine_has_its_adapters_and_its_requests_go_on(server: ServerProcess) -> None:
    post(server, "/v1/load_lora_adapter", lora_name="new", lora_path="later")
    wanted = logprobs(server, "new", max_tokens=200)
    found: list[list[float]] = []
    thread = threading.Thread(target=lambda: found.append(logprobs(server, "new", max_tokens=200, cache_salt="x")))
    thread.start()
    wait_until(lambda: in_use(server)["running_lora_adapters"] == "new")
    os.kill(server.stats()["engine"]["pid"], signal.SIGKILL)
    thread.join()
    assert found == [wanted]
    assert len({tuple(logprobs(server, name)) for name in models(server)}) == 4
