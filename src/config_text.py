"""Reads YAML, keys and flags, and shows settings, without a secret in any message."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any, NoReturn

import yaml

from src.engine.config import ConfigError

_URL_SECRETS = (
    (re.compile(r"(:/+)[^\s'\"]*@"), r"\1***@"),  # one slash: a Path of a URL
    (re.compile(r"(:/+[^\s'\"?]*\?)[^\s'\"]+"), r"\1***"),
)


def check_key_text(key: str) -> str:
    """Returns the key. Raises ValueError if no client could send it, or everybody could."""
    if not key.strip():
        raise ValueError("an empty or blank key lets everybody in; unset it to serve without keys")
    if key != key.strip():
        raise ValueError("the key begins or ends with white space, which clients cannot send")
    if any(ord(char) < 32 or ord(char) == 127 for char in key):
        raise ValueError("the key holds a control character, which clients cannot send")
    return key


def read_yaml(path: Path, what: str) -> Any:
    """Returns what a YAML file holds.

    Raises:
        ConfigError: it cannot be read or parsed. PyYAML's own text is left out, as it quotes lines that may hold a key.
    """
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{what} does not exist") from None
    except UnicodeError:
        raise ConfigError(f"{what} is not UTF-8 text") from None
    except OSError as error:
        raise ConfigError(f"{what} cannot be read: {error.strerror or error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{what} is not valid YAML{yaml_problem(error)}") from None


def yaml_problem(error: Exception) -> str:
    """Returns place and kind of a YAML error, without the text that is there."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark is not None else ""
    shown = re.sub("'.*'", "...", str(problem)) if problem else ""
    return f"{place}: {shown}" if shown else place


def without_secrets(text: str) -> str:
    """Returns the text with the user, password and query of each URL masked."""
    for pattern, masked in _URL_SECRETS:
        text = pattern.sub(masked, text)
    return text


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Leaves out values, which argparse would quote: a misspelt --api-key is followed by a key."""
        kind, _, rest = message.partition("unrecognized arguments: ")
        if rest and not kind:
            names = [word.partition("=")[0] for word in rest.split() if word.startswith("--")]
            message = (
                f"unknown flags: {', '.join(names)}"
                if names
                else "unknown arguments; every flag begins with --"
            )
        super().error(without_secrets(message))
