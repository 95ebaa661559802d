"""/v1/completions, /tokenize and /detokenize."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.contract import MODEL, USER, VOCABULARY, tool
from tests.support.server_process import ServerProcess


def test_completions_of_every_prompt_form_agree(client: openai.OpenAI) -> None:
    ids = VOCABULARY.encode("Once upon a time")
    texts = []
    for prompt in ("Once upon a time", ["Once upon a time"], ids, [ids]):
        answer = client.completions.create(model=MODEL, prompt=prompt, temperature=0, max_tokens=12)
        assert answer.usage.prompt_tokens == len(ids)
        texts.append(answer.choices[0].text)
    assert len(set(texts)) == 1


def test_completions_number_their_choices_and_stream_alike(client: openai.OpenAI) -> None:
    options: Any = {"model": MODEL, "prompt": ["a", "b"], "n": 2, "seed": 5, "max_tokens": 10}
    whole = client.completions.create(**options)
    assert [c.index for c in whole.choices] == [0, 1, 2, 3]
    texts: dict[int, str] = {}
    with httpx.stream(
        "POST", str(client.base_url) + "completions", json={**options, "stream": True}, timeout=60
    ) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    assert texts == {c.index: c.text for c in whole.choices}


def test_completions_default_to_sixteen_tokens_and_echo(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="Hi", echo=True, extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == 16
    assert answer.choices[0].text.startswith("Hi")


def test_completion_logprobs(client: openai.OpenAI) -> None:
    choice = client.completions.create(
        model=MODEL, prompt="Hi", logprobs=2, max_tokens=5, temperature=0, extra_body={"ignore_eos": True}
    ).choices[0]
    numbers = choice.logprobs
    assert (
        len(numbers.tokens) == len(numbers.token_logprobs) == len(numbers.top_logprobs) == len(numbers.text_offset) == 5
    )
    assert all(
        len(top) == 2 and max(top.values()) == pytest.approx(lp)
        for top, lp in zip(numbers.top_logprobs, numbers.token_logprobs, strict=True)
    )


def test_completions_offsets_count_what_a_stop_string_holds_back(client: openai.OpenAI) -> None:
    options: Any = {"model": MODEL, "prompt": "Hi", "logprobs": 0, "max_tokens": 20, "temperature": 0}
    whole = client.completions.create(**options, extra_body={"ignore_eos": True}).choices[0]
    stop = whole.text[3:20] + "never"
    held = client.completions.create(**options, stop=stop, extra_body={"ignore_eos": True}).choices[0]
    assert held.text == whole.text
    assert held.logprobs.text_offset == whole.logprobs.text_offset


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [201_088]}, "prompt"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"logprobs": 6}, "logprobs"),
        ({"prompt": [True]}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
def test_bad_completions_are_named(server: ServerProcess, change: dict[str, Any], param: str) -> None:
    response = httpx.post(f"{server.url}/v1/completions", json={"model": MODEL, "prompt": "x"} | change)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_an_empty_prompt_is_called_empty(server: ServerProcess) -> None:
    response = httpx.post(f"{server.url}/v1/completions", json={"model": MODEL, "prompt": ["x", ""]})
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, "prompt", "invalid_value")
    assert "empty" in error["message"]


def test_completions_count_what_each_prompt_had_cached(client: openai.OpenAI) -> None:
    prompts = ["one two three four " * 20, "five six seven eight " * 20]
    options: Any = {"model": MODEL, "prompt": prompts, "max_tokens": 1}
    client.completions.create(**options)
    usage = client.completions.create(**options).usage
    assert usage.prompt_tokens_details.cached_tokens > usage.prompt_tokens / 2


def test_raw_prompts_without_a_break_are_no_trap(server: ServerProcess) -> None:
    """The library alone would need minutes for each."""
    long = "a" * 400_000
    body = {"model": MODEL, "prompt": [long, *"b" * 128], "max_tokens": 1}
    response = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
    assert response.json()["error"]["code"] == "array_above_max_length"
    tokens = httpx.post(f"{server.url}/tokenize", json={"prompt": long, "parse_special": True}, timeout=60).json()
    assert tokens["count"] == 50_000


@pytest.mark.parametrize("keyword", ["allOf", "prefixItems", "items", "properties"])
@pytest.mark.parametrize("depth", [30, 330, 420])
def test_schemas_in_schemas_are_taken_or_refused(server: ServerProcess, keyword: str, depth: int) -> None:
    schema: Any = {"type": "string"}
    for _ in range(depth):
        inner = {"items": schema, "properties": {"a": schema}}.get(keyword, [schema])
        schema = {"type": "object" if keyword == "properties" else "array", keyword: inner}
    tools = [tool("f", {"type": "object", "properties": {"p": schema}})]
    body = {"messages": [USER], "tools": tools}
    response = httpx.post(f"{server.url}/tokenize", json=body, timeout=60)
    assert response.status_code in ((200,) if depth == 30 else (200, 400)), response.text
    if response.status_code == 400:
        assert "nested too deeply" in response.json()["error"]["message"]


def test_tokenize_and_back(server: ServerProcess) -> None:
    text = "Hello <|start|> 日本"
    tokens = httpx.post(f"{server.url}/tokenize", json={"prompt": text}).json()
    assert tokens["tokens"] == VOCABULARY.encode(text) and tokens["count"] == len(tokens["tokens"])
    assert httpx.post(f"{server.url}/detokenize", json={"tokens": tokens["tokens"]}).json()["prompt"] == text
    special = httpx.post(f"{server.url}/tokenize", json={"prompt": text, "parse_special": True}).json()["tokens"]
    assert 200_006 in special
    assert httpx.post(f"{server.url}/detokenize", json={"tokens": [-1]}).status_code == 400


def test_the_tokenizer_is_described_as_vllm_does(server: ServerProcess) -> None:
    """lm-evaluation-harness (`tokenizer_backend=remote`) reads it first, then encodes the names of special tokens."""
    info = httpx.get(f"{server.url}/tokenizer_info").json()
    assert info["tokenizer_class"] == "PreTrainedTokenizerFast"
    ids = {"bos_token": 199_998, "eos_token": 200_002, "pad_token": 199_999}
    for name, token_id in ids.items():
        body = {"prompt": info[name], "add_special_tokens": False}
        tokens = httpx.post(f"{server.url}/tokenize", json=body).json()["tokens"]
        assert tokens == [token_id]
        back = httpx.post(f"{server.url}/detokenize", json={"tokens": tokens}).json()
        assert back["prompt"] == info[name]
    as_text = {"prompt": "<|return|>", "add_special_tokens": True, "parse_special": False}
    assert len(httpx.post(f"{server.url}/tokenize", json=as_text).json()["tokens"]) > 1
