"""The fields of /v1/files and /v1/batches."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, Field, WithJsonSchema, model_validator

from gptoss.api.http.fields import Metadata, Strict, contract_error

MIN_EXPIRY_S, MAX_EXPIRY_S = 3600, 2_592_000
MAX_METADATA_KEY, MAX_METADATA_VALUE = 64, 512
Seconds = Annotated[int, Field(ge=MIN_EXPIRY_S, le=MAX_EXPIRY_S)]


class ExpiresAfter(Strict):
    anchor: Literal["created_at"]
    seconds: Seconds


class BatchRequest(Strict):
    input_file_id: str
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"]
    completion_window: Literal["24h"]
    metadata: Metadata | None = None
    output_expires_after: ExpiresAfter | None = None

    @model_validator(mode="after")
    def _check_metadata(self) -> Self:
        for name, value in (self.metadata or {}).items():
            if len(name) > MAX_METADATA_KEY or len(value) > MAX_METADATA_VALUE:
                raise contract_error(
                    f"Keys of 'metadata' have at most {MAX_METADATA_KEY} characters, values {MAX_METADATA_VALUE}.",
                    "metadata",
                    "string_above_max_length",
                )
        return self


Text = Annotated[str | None, WithJsonSchema({"type": "string"})]


class FilesQuery(BaseModel):
    """Query parameters."""

    purpose: Text = None
    limit: Annotated[int, Field(ge=1, le=10_000)] = 10_000
    order: Literal["asc", "desc"] = "desc"
    after: Text = None


class BatchesQuery(BaseModel):
    """Query parameters."""

    limit: Annotated[int, Field(ge=1, le=100)] = 20
    after: Text = None
