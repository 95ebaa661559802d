"""The built-in tools: one line each."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import NamedTuple, cast

from gptoss.config.schema import ServerConfig
from gptoss.generation.tool_types import ToolRunner


class Builtin(NamedTuple):
    """A tool by the name of its namespace.

    `make`: `module:function`, called with the configuration when the server starts, and with a function that counts the
    tokens of a text if it `counts_tokens`. It returns the runner, or None where the tool is off, and raises ConfigError
    where it is on and cannot run.
    """

    name: str
    make: str
    counts_tokens: bool = False


BUILTINS: tuple[Builtin, ...] = (
    Builtin("browser", "gptoss.tools.browser.build:make_browser", counts_tokens=True),
    Builtin("python", "gptoss.tools.python_sandbox.build:build_python"),
)


def make_builtins(config: ServerConfig, count_tokens: Callable[[str], int]) -> dict[str, ToolRunner]:
    """The runners of the tools that are on, by name. Raises ConfigError."""
    found: dict[str, ToolRunner] = {}
    for one in BUILTINS:
        module, _, function = one.make.partition(":")
        given = (config, count_tokens) if one.counts_tokens else (config,)
        runner = cast("ToolRunner | None", getattr(importlib.import_module(module), function)(*given))
        if runner is not None:
            found[one.name] = runner
    return found
