"""The body of /v1/completions."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, WithJsonSchema, model_validator

from gptoss.api.http.fields import SamplingFields, contract_error
from gptoss.api.http.output_format import ResponseFormat
from gptoss.harmony.special_tokens import VOCAB_SIZE

MAX_COMPLETIONS = 128  # of one request
DEFAULT_MAX_TOKENS = 16  # OpenAI's
_TOKENS = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0, "maximum": VOCAB_SIZE - 1}}
_PROMPT = {
    "anyOf": [
        {"type": "string"},
        _TOKENS,
        *(
            {"type": "array", "minItems": 1, "maxItems": MAX_COMPLETIONS, "items": one}
            for one in ({"type": "string"}, _TOKENS)
        ),
    ]
}


class CompletionRequest(SamplingFields):
    prompt: Annotated[Any, WithJsonSchema(_PROMPT)] = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    best_of: Annotated[int, Field(ge=1, le=20)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: bool | None = None
    suffix: str | None = None
    # extensions, named as elsewhere
    response_format: ResponseFormat | None = None
    include_relaxations: bool | None = None

    @model_validator(mode="after")
    def _check(self) -> CompletionRequest:
        if self.suffix:
            raise contract_error("'suffix' is not supported by this model.", "suffix", "unsupported_parameter")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise contract_error("'best_of' may only equal 'n'.", "best_of", "unsupported_value")
        if self.max_tokens == 0 and not self.echo:
            raise contract_error("'max_tokens': 0 requires 'echo': true.", "max_tokens", "integer_below_min_value")
        return self
