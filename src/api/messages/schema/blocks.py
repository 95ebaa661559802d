"""The messages of a body of /v1/messages, and their content blocks by the role that may have them.

Tags are in angle brackets, which no field name has.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, WithJsonSchema, model_validator

from gptoss.api.http.fields import FIRST_PROBLEM, Strict, contract_error
from gptoss.api.http.openapi import object_of
from gptoss.api.messages.schema.tools import CustomTool

# What Anthropic's servers leave in a history when they run tools themselves
_FOREIGN = re.compile(
    r"server_tool_use|(?!tool_result|mcp_tool_result)\w+_tool_result|container_upload|compaction|fallback|advisor\w*"
)


def tag(value: Any) -> str | None:
    """Chooses the model of a block by its type."""
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    if not isinstance(kind, str):
        return None
    return "<foreign>" if _FOREIGN.fullmatch(kind) else f"<{kind}>"


def form(value: Any) -> str:
    return "<list>" if isinstance(value, list) else "<string>"


class Block(Strict):
    cache_control: Any = None


class TextBlock(Block):
    also_known = frozenset({"parsed_output"})
    opaque = frozenset({"citations"})

    type: Literal["text"]
    text: str
    citations: Any = None


class ImageBlock(Block):
    type: Literal["image"]

    @model_validator(mode="after")
    def _refuse(self) -> Self:
        raise contract_error("Images are not supported: this model reads text only.", code="unsupported_value")


class SearchResultBlock(Block):
    also_known = frozenset({"citations"})

    type: Literal["search_result"]
    source: str
    title: str
    content: Annotated[list[TextBlock], FIRST_PROBLEM]


class ToolReferenceBlock(Block):
    type: Literal["tool_reference"]
    tool_name: str


Text = Annotated[str, Tag("<string>")]
AText = Annotated[TextBlock, Tag("<text>")]
AnImage = Annotated[ImageBlock, Tag("<image>")]
TextOrImage = Annotated[AText | AnImage, Discriminator(tag)]
DocumentContent = Annotated[Text | Annotated[list[TextOrImage], FIRST_PROBLEM, Tag("<list>")], Discriminator(form)]
SystemPrompt = Annotated[Text | Annotated[list[TextBlock], FIRST_PROBLEM, Tag("<list>")], Discriminator(form)]


class DocumentSource(Strict):
    type: str
    media_type: str | None = None
    data: str | None = None
    content: DocumentContent | None = None

    @model_validator(mode="after")
    def _is_text(self) -> Self:
        if self.type not in ("text", "content") or (self.data if self.type == "text" else self.content) is None:
            raise contract_error(
                "Documents are supported as text only: a source of type 'text' has 'data', one of 'content' 'content'.",
                code="unsupported_value",
            )
        return self


class DocumentBlock(Block):
    also_known = frozenset({"citations"})

    type: Literal["document"]
    source: DocumentSource
    title: str | None = None
    context: str | None = None


ASearchResult = Annotated[SearchResultBlock, Tag("<search_result>")]
ADocument = Annotated[DocumentBlock, Tag("<document>")]
ResultBlock = Annotated[
    AText | AnImage | ASearchResult | ADocument | Annotated[ToolReferenceBlock, Tag("<tool_reference>")],
    Discriminator(tag),
]
ResultContent = Annotated[Text | Annotated[list[ResultBlock], FIRST_PROBLEM, Tag("<list>")], Discriminator(form)]


class ToolResultBlock(Block):
    type: Literal["tool_result"]
    tool_use_id: Annotated[str, Field(min_length=1)]
    content: ResultContent | None = None
    is_error: bool | None = None


class ToolUseBlock(Block):
    also_known = frozenset({"caller"})
    opaque = frozenset({"input"})

    type: Literal["tool_use"]
    id: Annotated[str, Field(min_length=1)]
    name: str
    input: dict[str, Any]


# the schema of tool_result's content again would be more than generators of requests can read
_TEXTS = {"type": "array", "items": object_of({"type": {"const": "text"}, "text": {"type": "string"}})}
McpContent = Annotated[ResultContent, WithJsonSchema({"anyOf": [{"type": "string"}, _TEXTS]})]


class McpToolUseBlock(Block):
    """A call of a tool of an MCP server, which a server has run."""

    opaque = frozenset({"input"})

    type: Literal["mcp_tool_use"]
    id: Annotated[str, Field(min_length=1)]
    name: str
    server_name: str
    input: dict[str, Any]


class McpToolResultBlock(Block):
    type: Literal["mcp_tool_result"]
    tool_use_id: Annotated[str, Field(min_length=1)]
    content: McpContent | None = None
    is_error: bool | None = None


class ThinkingBlock(Block):
    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


class RedactedThinkingBlock(Block):
    type: Literal["redacted_thinking"]
    data: str


class ForeignBlock(Strict):
    """What a server's own tools leave. Its other fields are its own."""

    is_open = True
    opaque = frozenset({"input", "content"})

    type: str
    id: Any = None
    name: Any = None
    input: Any = None
    tool_use_id: Any = None
    content: Any = None


class ChangedTool(Strict):
    type: Literal["tool_reference", "tool_definition"]
    name: str | None = None
    tool_name: str | None = None
    definition: CustomTool | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.type == "tool_definition" and self.definition is None:
            raise contract_error("A tool_definition needs 'definition'.", code="missing_required_parameter")
        if self.type == "tool_reference" and not (self.name or self.tool_name):
            raise contract_error("A tool_reference needs 'name'.", code="missing_required_parameter")
        return self

    @property
    def tool(self) -> str:
        """The name of the tool."""
        return self.definition.name if self.definition is not None else self.name or self.tool_name or ""


class ToolChangeBlock(Block):
    """Tools that are added or removed in mid-conversation."""

    type: Literal["tool_addition", "tool_removal"]
    tool: ChangedTool


AForeign = Annotated[ForeignBlock, Tag("<foreign>")]
UserBlock = Annotated[
    AText | AnImage | ASearchResult | ADocument | AForeign | Annotated[ToolResultBlock, Tag("<tool_result>")],
    Discriminator(tag),
]
UserContent = Annotated[Text | Annotated[list[UserBlock], FIRST_PROBLEM, Tag("<list>")], Discriminator(form)]
AssistantBlock = Annotated[
    AText
    | AForeign
    | Annotated[ThinkingBlock, Tag("<thinking>")]
    | Annotated[RedactedThinkingBlock, Tag("<redacted_thinking>")]
    | Annotated[ToolUseBlock, Tag("<tool_use>")]
    | Annotated[McpToolUseBlock, Tag("<mcp_tool_use>")]
    | Annotated[McpToolResultBlock, Tag("<mcp_tool_result>")],
    Discriminator(tag),
]
AssistantContent = Annotated[Text | Annotated[list[AssistantBlock], FIRST_PROBLEM, Tag("<list>")], Discriminator(form)]
SystemBlock = Annotated[
    AText | Annotated[ToolChangeBlock, Tag("<tool_addition>")] | Annotated[ToolChangeBlock, Tag("<tool_removal>")],
    Discriminator(tag),
]
SystemContent = Annotated[Text | Annotated[list[SystemBlock], FIRST_PROBLEM, Tag("<list>")], Discriminator(form)]


class UserMessage(Strict):
    role: Literal["user"]
    content: UserContent


class AssistantMessage(Strict):
    role: Literal["assistant"]
    content: AssistantContent


class SystemMessage(Strict):
    """Instructions at the place where they begin to hold."""

    role: Literal["system"]
    content: SystemContent


def _role(value: Any) -> str | None:
    role = value.get("role") if isinstance(value, dict) else getattr(value, "role", None)
    return f"<{role}>" if isinstance(role, str) else None


Message = Annotated[
    Annotated[UserMessage, Tag("<user>")]
    | Annotated[AssistantMessage, Tag("<assistant>")]
    | Annotated[SystemMessage, Tag("<system>")],
    Discriminator(_role),
]
