"""Python as a tool that the server runs: one container for each response chain."""

from __future__ import annotations

import base64
import json
import re
import time
from dataclasses import replace
from typing import Any, cast

from openai_harmony import ToolNamespaceConfig

from gptoss.generation.tool_types import (
    AnswerFilter,
    FailureKind,
    ImagePart,
    ResultPart,
    SessionOptions,
    TextPart,
    ToolCall,
    ToolFailure,
    ToolResult,
    ToolSession,
    ToolUnavailableError,
)
from gptoss.harmony.conversation import ToolNamespace
from gptoss.tools.python_sandbox.bubblewrap import Sandbox
from gptoss.tools.python_sandbox.container import INTERRUPT_S, Container, Execution, Status
from gptoss.tools.python_sandbox.errors import SandboxError
from gptoss.tools.python_sandbox.limits import SandboxLimits

MAX_CODE_BYTES = 2**20
MARGIN_S = INTERRUPT_S + 0.5  # before a call's deadline, so that its result says what happened
NOTHING = "[The code printed nothing, and its last line has no value: use print().]"
_FENCED = re.compile(r"\s*```(?:python|py)?[ \t]*\n(.*?)\n?```\s*", re.DOTALL)
_TRAINED_TIMEOUT = "120.0 seconds"
_TRAINED_NETWORK = "Internet access for this session is UNKNOWN. Depends on the cluster."
_FAILURES: dict[Status, FailureKind] = {
    "timeout": "timeout",
    "output": "limit",
    "memory": "limit",
    "ended": "execution",
}


def python_namespace(timeout_s: float) -> ToolNamespace:
    """Python as gpt-oss was trained to see it, with what is known here: the time limit, and no network."""
    known = ToolNamespaceConfig.python()
    text = (known.description or "").replace(_TRAINED_TIMEOUT, f"{timeout_s:.1f} seconds")
    return ToolNamespace(known.name, text.replace(_TRAINED_NETWORK, "Internet access for this session is disabled."))


class PythonSession:
    """A container, as the tool loop sees it."""

    def __init__(self, container: Container) -> None:
        self.container = container

    @property
    def id(self) -> str:
        return self.container.id

    @property
    def is_alive(self) -> bool:
        return self.container.is_alive

    def answer_filter(self) -> AnswerFilter | None:
        return None

    async def close(self) -> None:
        await self.container.close()


class PythonRunner:
    """Runs `python`, whose calls are plain code."""

    name = "python"
    parallel = False

    def __init__(self, sandbox: Sandbox, limits: SandboxLimits) -> None:
        self._sandbox, self._limits = sandbox, limits
        self.namespace = python_namespace(limits.timeout_s)

    async def open(self, options: SessionOptions) -> ToolSession:
        """Starts a container; `memory_bytes` of the options lowers its memory limit."""
        memory = options.options.get("memory_bytes")
        limits = self._limits
        if isinstance(memory, int):
            limits = replace(limits, memory_bytes=min(memory, limits.memory_bytes))
        try:
            return PythonSession(await Container.start(self._sandbox, limits))
        except SandboxError as error:
            raise ToolUnavailableError(f"No container can be started: {error}") from None

    async def close(self) -> None:
        """Does nothing: containers are sessions."""

    async def call(self, call: ToolCall, session: ToolSession) -> ToolResult:
        """Runs the code. The result has the `outputs` of a code_interpreter_call."""
        container = cast(PythonSession, session).container
        code = code_of(call.text)
        if len(code.encode(errors="replace")) > MAX_CODE_BYTES:
            return ToolResult.failed("invalid", f"The code has more than {MAX_CODE_BYTES} bytes.")
        left_s = call.deadline - time.monotonic() - MARGIN_S
        execution = await container.run(code, max(0.1, min(container.limits.timeout_s, left_s)))
        return _result(execution)


def code_of(text: str) -> str:
    """The code of a call: as it is, or within the fences or the JSON object that models put around it."""
    fenced = _FENCED.fullmatch(text)
    if fenced is not None:
        return fenced[1]
    if text.lstrip().startswith("{"):
        try:
            given = json.loads(text)
        except ValueError:
            return text
        if isinstance(given, dict) and given.keys() == {"code"} and isinstance(given["code"], str):
            return str(given["code"])
    return text


def _result(execution: Execution) -> ToolResult:
    outputs: list[dict[str, Any]] = []
    if execution.text:
        outputs.append({"type": "logs", "logs": execution.text})
    for image in execution.images:
        url = f"data:{image.media_type};base64,{base64.b64encode(image.data).decode()}"
        outputs.append({"type": "image", "url": url})
    kind = _FAILURES.get(execution.status)
    said = [execution.text.removesuffix("\n")] if execution.text else []
    if execution.detail and execution.status != "error":  # an error is in the text
        said.append(execution.detail)
    if not said and not execution.images:
        said.append(NOTHING)
    parts: list[ResultPart] = [TextPart(one) for one in said]
    parts += [ImagePart(one.data, one.media_type) for one in execution.images]
    failure = None if kind is None else ToolFailure(kind, execution.detail)
    return ToolResult(tuple(parts), failure, {"outputs": outputs})
