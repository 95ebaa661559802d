"""Reads YAML, keys and flags, and shows settings, without a secret in any message."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any, NoReturn

import yaml

from gptoss.config.errors import ConfigError

# a sentence does not show where a password ends: mask too much rather than too little
_URL_SECRETS = (
    (re.compile(r"(:[/\\]|[/\\]{2})([/\\]*)[^\n]*@"), r"\1\2***@"),  # one slash: a Path of a URL
    (re.compile(r"[^\s:@/\\'\"]+:(?![/\\])\S*@(?=\S)"), "***@"),
    (re.compile(r"([:/\\][/\\][^\s?#;]*[?#;])\S*[^\s'\"\].,]"), r"\1***"),
    (re.compile(r"(?i)\b(\w*(?:token|key|secret|password|passwd|pwd|auth|sig)=)[^\s*]\S*"), r"\1***"),
)
_SECRET_TABLES, _MASKED = ("headers", "env"), "***"  # of mcp_servers
_URL_BEGIN = re.compile(r"\s*(?:[A-Za-z][\w+.-]*:)?[/\\]+")
_SETTING_NAME = re.compile(r"[a-z_]{1,40}")
_FLAG_NAME = re.compile(r"--[a-z_-]{1,40}")


def check_key_text(key: str) -> str:
    """Returns the API key. Raises ValueError if clients could not send it, or if it lets everyone in."""
    if not key.strip():
        raise ValueError("an empty or blank key lets everyone in; unset it to serve without keys")
    if key != key.strip():
        raise ValueError("the key begins or ends with white space, which clients cannot send")
    if any(ord(char) < 32 or ord(char) == 127 for char in key):
        raise ValueError("the key holds a control character, which clients cannot send")
    if not key.isascii():
        raise ValueError("the key holds a character that is not ASCII, which clients cannot send")
    return key


def read_yaml(path: Path, what: str) -> Any:
    """Returns the parsed content of a YAML file.

    Raises:
        ConfigError: it cannot be read or parsed. PyYAML's own text is left out: it quotes lines that may contain a key.
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
    """Returns the position and kind of a YAML error, without quoting the file."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark is not None else ""
    known, *quoted = re.split(r"['\"!*&]", str(problem or ""), maxsplit=1)
    shown = known.strip() + (" ..." if quoted else "")
    return f"{place}: {shown}" if shown else place


def yaml_value(value: Any) -> str:
    """Returns the value as YAML on one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("...\n").strip()


def without_secrets(text: str) -> str:
    """Returns the text with the user, password, query and fragment of each URL masked."""
    for pattern, masked in _URL_SECRETS:
        text = pattern.sub(masked, text)
    return text


def masked_value(value: Any) -> Any:
    """Returns a setting's value with the same parts of each URL masked."""
    if isinstance(value, dict):
        return {key: _MASKED if key in _SECRET_TABLES else masked_value(item) for key, item in value.items()}
    if isinstance(value, list):
        return [masked_value(item) for item in value]
    if isinstance(value, Path):
        value = str(value)
    if not isinstance(value, str):
        return value
    begin = _URL_BEGIN.match(value)
    if "@" in value and (":" in value or begin):
        value = (begin.group() if begin else "") + "***@" + value.rpartition("@")[2]
    if ":/" in value or "//" in value or "\\" in value or "***@" in value:
        value = re.sub(r"(?s)([?#;]).+", r"\1***", value)
    return without_secrets(value)


def quoted_value(value: Any) -> str:
    """Returns ", got VALUE" for an error message, or nothing if the value may be a secret.

    Numbers are shown, and texts without the marks of a secret.
    """
    is_shown = isinstance(value, (int, float)) or (
        isinstance(value, str) and len(value) <= 200 and not re.search(r"[@?#;=\\]", value)
    )
    return f", got {value!r}" if is_shown else ""


def shown_name(name: str) -> str:
    """Returns the name of an unknown key, unless it may be a secret written in the place of a key."""
    return name if _SETTING_NAME.fullmatch(name) else "a name that is not shown"


def shown_flag(name: str) -> str:
    """Returns the name of an unknown flag, unless it may be a secret.

    That includes a secret after another sign than "=".
    """
    return name if _FLAG_NAME.fullmatch(name) else "one that is not shown (names have lower-case letters and hyphens)"


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Exits with a message that quotes no values, unlike argparse's.

        A misspelt --api-key is followed by a key.
        """
        kind, _, rest = message.partition("unrecognized arguments: ")
        if rest and not kind:
            names = [shown_flag(word.partition("=")[0]) for word in rest.split() if word.startswith("--")]
            message = f"unknown flags: {', '.join(names)}" if names else "unknown arguments; every flag begins with --"
        super().error(without_secrets(message))
