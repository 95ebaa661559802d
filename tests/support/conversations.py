"""Conversations and tools of tests, from messages and functions as chat clients write them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gptoss.api.chat.messages import read_messages
from gptoss.api.chat.schema import FunctionDefinition, Message
from gptoss.harmony.conversation import Conversation, ToolDefinition


def conversation(messages: Sequence[Mapping[str, Any]]) -> Conversation:
    return read_messages([Message.model_validate(dict(message)) for message in messages])


def definitions(functions: Sequence[Mapping[str, Any]]) -> list[ToolDefinition]:
    read = [FunctionDefinition.model_validate(dict(function)) for function in functions]
    return [ToolDefinition(one.name, one.description, one.parameters) for one in read]
