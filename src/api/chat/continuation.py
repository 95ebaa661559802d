"""Where in the conversation the answer begins: vLLM's `continue_final_message` and `add_generation_prompt`."""

from __future__ import annotations

from dataclasses import replace

from gptoss.api.chat.schema import ChatCompletionRequest
from gptoss.api.http.errors import InvalidRequest
from gptoss.generation.request import Beginning
from gptoss.harmony.bpe import UNLIMITED, Limits
from gptoss.harmony.conversation import AssistantMessage, Conversation
from gptoss.harmony.special_tokens import CHANNEL, END, MESSAGE, START
from gptoss.harmony.vocabulary_files import Vocabulary
from gptoss.prompt_builder import PromptTokens

FIELD = "continue_final_message"


def beginning(request: ChatCompletionRequest, *, constrained: bool) -> Beginning:
    """`constrained`: the answer has to be a call, or of a given format. Raises InvalidRequest."""
    if not request.continue_final_message:
        return "turn" if request.add_generation_prompt is False else "message"
    if request.add_generation_prompt:
        raise InvalidRequest(f"'{FIELD}' cannot be combined with 'add_generation_prompt'.", FIELD)
    last = request.messages[-1]
    if last.role != "assistant" or not last.content:
        raise InvalidRequest(f"'{FIELD}' needs a last message of the assistant with content.", FIELD)
    if last.tool_calls or last.function_call:
        raise InvalidRequest(f"'{FIELD}' cannot continue a message with calls.", FIELD)
    if constrained:
        raise InvalidRequest(f"'{FIELD}' cannot be combined with a response format or a forced call.", FIELD)
    return "final"


def begun(
    prompt: PromptTokens, last: Conversation, where: Beginning, vocabulary: Vocabulary, limits: Limits = UNLIMITED
) -> PromptTokens:
    """The prompt up to where the answer begins. `last`: the message to continue, which `prompt` does not have, and its
    reasoning. Raises as `Vocabulary.encode` does."""
    opening = [START, *vocabulary.encode("assistant")]
    ids = prompt.token_ids
    if where == "turn":
        assert ids[-len(opening) :] == opening
        return replace(prompt, token_ids=ids[: -len(opening)])
    if where == "message":
        return prompt
    texts = [message for message in last.messages if isinstance(message, AssistantMessage)]
    more: list[int] = []
    for thought in (message.text for message in texts if message.channel == "analysis"):
        more += [CHANNEL, *vocabulary.encode("analysis"), MESSAGE]
        more += [*vocabulary.encode(thought, limits.less(len(more))), END, *opening]
    words = "".join(message.text for message in texts if message.channel != "analysis")
    more += [CHANNEL, *vocabulary.encode("final"), MESSAGE]
    more += vocabulary.encode(words, limits.less(len(more)))
    return replace(prompt, token_ids=ids + more)
