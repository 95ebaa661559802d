"""LangChain's own integration tests for chat models, against a running server.

TEST_SERVER_URL=http://127.0.0.1:8000 pytest compat/test_langchain.py
"""

from __future__ import annotations

import os
from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests

RANDOM = os.environ.get("TEST_SERVER_RANDOM_WEIGHTS", "1") == "1"


class TestServer(ChatModelIntegrationTests):
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {
            "model": os.environ.get("TEST_SERVER_MODEL", "gpt-oss-nano"),
            "base_url": os.environ.get("TEST_SERVER_URL", "http://127.0.0.1:8000") + "/v1",
            "api_key": "none",
            "max_tokens": 300,
            "temperature": 0.5,
            "max_retries": 0,
            "stream_usage": True,
            # A model of random weights leaves its analysis only when told to, and closes a string only by chance:
            # these are the tokens `"`, `"}`, `",`, `}` and `]`.
            "extra_body": {"reasoning_budget": 8},
            "logit_bias": dict.fromkeys(("1", "18583", "672", "92", "60"), 14) if RANDOM else None,
        }

    @property
    def has_tool_choice(self) -> bool:
        return True

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def supports_image_inputs(self) -> bool:
        return False
