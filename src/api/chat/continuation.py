"""Where the answer begins: vLLM's `continue_final_message` and `add_generation_prompt`."""

from __future__ import annotations

from gptoss.api.chat.messages import read_messages
from gptoss.api.chat.schema import ChatCompletionRequest
from gptoss.api.http.errors import InvalidRequest
from gptoss.generation.request import Prefill
from gptoss.harmony.conversation import AssistantMessage

FIELD = "continue_final_message"


def read_prefill(request: ChatCompletionRequest, *, constrained: bool) -> Prefill | None:
    """The last message where the answer continues it. `constrained`: the answer has to be a call, or of a given format.

    Raises InvalidRequest.
    """
    if not request.continue_final_message:
        return None
    if request.add_generation_prompt:
        raise InvalidRequest(f"'{FIELD}' cannot be combined with 'add_generation_prompt'.", FIELD)
    last = request.messages[-1]
    if last.role != "assistant" or not last.content:
        raise InvalidRequest(f"'{FIELD}' needs a last message of the assistant with content.", FIELD)
    if last.tool_calls or last.function_call:
        raise InvalidRequest(f"'{FIELD}' cannot continue a message with calls.", FIELD)
    if constrained:
        raise InvalidRequest(f"'{FIELD}' cannot be combined with a response format or a forced call.", FIELD)
    texts = [one for one in read_messages([last]).messages if isinstance(one, AssistantMessage)]
    return Prefill(
        "".join(text.text for text in texts if text.channel != "analysis"),
        [text.text for text in texts if text.channel == "analysis"],
    )
