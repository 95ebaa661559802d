"""Tools that OpenAI defines and the client runs: `apply_patch`, `shell` and `local_shell`.

The model is offered each as a tool of that name; its calls become the items that OpenAI's clients know. What is no
valid call of the kind stays a call of a custom tool or function of that name, so that nothing of it is lost.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from pydantic import Field, ValidationError

from gptoss.api.http.fields import Strict
from gptoss.api.responses.tools.patch import DESCRIPTION, GRAMMAR, Operation, parse_patch
from gptoss.generation.request import FunctionTool
from gptoss.harmony.conversation import FreeText

ClientKind = Literal["apply_patch", "shell", "local_shell"]
KINDS: tuple[ClientKind, ...] = ("apply_patch", "shell", "local_shell")
_TIMEOUT = {"type": "integer", "description": "milliseconds", "minimum": 1}
_SHELL = {
    "type": "object",
    "properties": {
        "commands": {"type": "array", "items": {"type": "string"}, "minItems": 1},
        "timeout_ms": _TIMEOUT,
        "max_output_length": {"type": "integer", "description": "characters of each output", "minimum": 1},
    },
    "required": ["commands"],
    "additionalProperties": False,
}
_LOCAL_SHELL = {
    "type": "object",
    "properties": {
        "command": {
            "type": "array",
            "items": {"type": "string"},
            "minItems": 1,
            "description": 'the program and its arguments, as in ["bash", "-lc", "ls"]',
        },
        "working_directory": {"type": "string"},
        "timeout_ms": _TIMEOUT,
        "env": {"type": "object", "additionalProperties": {"type": "string"}},
        "user": {"type": "string"},
    },
    "required": ["command"],
    "additionalProperties": False,
}


class ClientTool(Strict):
    type: ClientKind
    environment: dict[str, Any] | None = None  # of shell

    @property
    def name(self) -> str:
        return self.type

    @property
    def is_hosted(self) -> bool:
        """Whether it is to run in a container of OpenAI's."""
        return self.environment is not None and self.environment.get("type", "local") != "local"


class ShellAction(Strict):
    commands: list[str] = Field(min_length=1)
    timeout_ms: int | None = None
    max_output_length: int | None = None


class LocalShellAction(Strict):
    type: Literal["exec"] = "exec"
    command: list[str] = Field(min_length=1)
    env: dict[str, str] | None = None
    timeout_ms: int | None = None
    user: str | None = None
    working_directory: str | None = None


class ShellOutcome(Strict):
    type: Literal["exit", "timeout"]
    exit_code: int | None = None


class ShellOutput(Strict):
    stdout: str = ""
    stderr: str = ""
    outcome: ShellOutcome | None = None


def shown_as(kind: ClientKind) -> FunctionTool:
    """The tool as the model sees it."""
    if kind == "apply_patch":
        return FunctionTool(kind, DESCRIPTION, label="'apply_patch'", free_text=FreeText("lark", GRAMMAR))
    if kind == "shell":
        return FunctionTool(kind, "Runs commands in a shell, one after the other.", _SHELL)
    return FunctionTool(kind, "Runs a command on the user's machine.", _LOCAL_SHELL)


def items_of(kind: ClientKind, text: str) -> list[dict[str, Any]]:
    """The fields of the items of a call with this text; none if the call is not valid."""
    if kind == "apply_patch":
        return [{"type": "apply_patch_call", "operation": _fields(one)} for one in parse_patch(text) or ()]
    try:
        if kind == "shell":
            shell = ShellAction.model_validate_json(text)
            return [{"type": "shell_call", "action": shell.model_dump(), "environment": {"type": "local"}}]
        local = LocalShellAction.model_validate_json(text)
        action = local.model_dump(exclude_none=True) | {"env": local.env or {}}
        return [{"type": "local_shell_call", "action": action}]
    except ValidationError:
        return []


def _fields(operation: Operation) -> dict[str, Any]:
    diff = {} if operation.kind == "delete_file" else {"diff": operation.diff}
    return {"type": operation.kind, "path": operation.path, **diff}


def arguments_of(action: ShellAction | LocalShellAction) -> str:
    """The JSON with which the model makes this call."""
    fields = action.model_dump(exclude_none=True, exclude={"type"})
    if not fields.get("env"):
        fields.pop("env", None)
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":"))


def output_text(outputs: Sequence[ShellOutput]) -> str:
    """What the commands of a shell call came to, as text."""
    return "\n".join(line for output in outputs for line in _lines(output))


def _lines(output: ShellOutput) -> Iterator[str]:
    outcome = output.outcome
    if outcome is not None:
        yield "timed out" if outcome.type == "timeout" else f"exit code: {outcome.exit_code or 0}"
    if output.stdout:
        yield f"stdout:\n{output.stdout}"
    if output.stderr:
        yield f"stderr:\n{output.stderr}"
