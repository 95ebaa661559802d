"""An answer with tools on the real engine: what a later round computes again."""

from __future__ import annotations

import uuid
from typing import Any

import httpx
import openai
import pytest

from tests.support.mcp_server import mcp_over_http
from tests.support.server_process import running_server
from tests.support.vocabulary import public_vocabulary

BLOCK = 64
NEVER: Any = {"type": "mcp", "server_label": "calc", "require_approval": "never"}
FORCED: Any = {"type": "mcp", "server_label": "calc", "name": "add"}


@pytest.mark.nightly
def test_a_later_round_computes_less_than_a_block_again() -> None:
    with mcp_over_http() as url:
        servers = f"{{calc: {{url: '{url}'}}}}"
        flags = ("--model", "nano", "--cpu-kv-cache-gib", "0.2", "--mcp-servers", servers)
        with running_server(*flags) as server:
            client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", _strict_response_validation=True)
            model = client.models.list().data[0].id
            for words in (1, 60, 200):
                asked: Any = {
                    "model": model,
                    "instructions": uuid.uuid4().hex,
                    "input": "Hello. " * words + "What is 2 + 3? Use add.",
                    "tools": [NEVER],
                    "tool_choice": FORCED,
                    "max_output_tokens": 1000,
                    "reasoning": {"effort": "low"},
                }
                counted = httpx.post(f"{server.url}/v1/responses/input_tokens", json=asked).json()["input_tokens"]
                response = client.responses.create(**asked)
                assert response.status == "completed", response
                (called,) = [item for item in response.output if item.type == "mcp_call"]
                assert response.usage is not None
                text = called.output if called.error is None else called.error.content[0]["text"]  # type: ignore[union-attr,index]
                header = "<|start|>functions.calc__add to=assistant<|channel|>commentary<|message|>"
                result = public_vocabulary().encode_with_special(header) + public_vocabulary().encode(text or "")
                second = response.usage.input_tokens - counted
                earlier = (
                    second - len(result) - len(public_vocabulary().encode_with_special("<|end|><|start|>assistant"))
                )
                assert earlier > counted
                assert earlier - response.usage.input_tokens_details.cached_tokens < BLOCK
