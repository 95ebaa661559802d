"""Where configuration comes from: one YAML file, the environment over it, flags over both.

Every key of ServerConfig is a YAML key, an environment variable GPTOSS_<KEY> and a flag --<key-with-dashes>. What is
not set takes the profile's value where the profile has one, else the default.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import SecretStr, ValidationError

from gptoss.config.errors import ConfigError
from gptoss.config.schema import ENV_PREFIX, PROFILE_KEYS, ServerConfig
from gptoss.config.text import (
    Parser,
    masked_value,
    quoted_value,
    read_yaml,
    shown_name,
    without_secrets,
)
from gptoss.resources import resource

DEFAULT_CONFIG_FILE = resource("configs", "server_config.yaml")
# Names that operators know from elsewhere, below our own.
FOREIGN_ENV = {"TORCH_DTYPE": "dtype"}
# Read by our other programs (the command-line client, the tests), not by the server.
OTHER_PROGRAMS_ENV = frozenset({"GPTOSS_CONFIG", "GPTOSS_URL", "GPTOSS_TEST_CACHE"})
# Kubernetes describes every Service of a namespace to its pods, here those named gptoss or gptoss-<something>.
_KUBERNETES_ENV = re.compile(
    r"GPTOSS(_[A-Z0-9_]+)?"
    r"(_SERVICE_HOST|_SERVICE_PORT(_[A-Z0-9_]+)?|_PORT_\d+_(TCP|UDP|SCTP)(_PORT|_PROTO|_ADDR)?)"
)
_KUBERNETES_PORT = re.compile(r"GPTOSS(_[A-Z0-9_]+)?_PORT")
# Keys whose value is never quoted in an error.
SECRET_KEYS = ("api_key", "api_keys_file", "otlp_endpoint")


def load_config(argv: list[str] | None = None) -> tuple[ServerConfig, dict[str, str], bool]:
    """-> (configuration, where each set key came from, whether --print-config was given).

    Raises:
        ConfigError: an unknown key or a value that cannot be; the message names the key and its source.
    """
    parser = _parser()
    flags = {k: v for k, v in vars(parser.parse_args(argv)).items() if v is not None}
    print_config = flags.pop("print_config", False)
    path = Path(flags.pop("config", None) or os.environ.get(f"{ENV_PREFIX}CONFIG") or DEFAULT_CONFIG_FILE)
    environment = _from_environment()
    merged: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for key, value in _from_yaml(path).items():
        merged[key], origin[key] = value, str(path)
    for key, (name, value) in environment.items():
        merged[key], origin[key] = value, f"environment {name}"
    for key, value in flags.items():
        merged[key], origin[key] = value, "flag"
    _check_text(merged, origin)
    try:
        return ServerConfig(**merged), origin, print_config
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0]) if first["loc"] else "configuration"
        hint = f"known keys: {', '.join(ServerConfig.model_fields)}" if first["type"] == "extra_forbidden" else ""
        message = "unknown key" if hint else first["msg"].removeprefix("Value error, ")
        if key == "api_key" and first["type"] == "string_type":
            message += ": put the key in quotes"
        if len(first["loc"]) == 1 and not hint and key not in SECRET_KEYS:
            message += quoted_value(first["input"])
        name = shown_name(key) if hint else key
        raise ConfigError(
            f"{name} (from {origin.get(key, 'defaults')}): {without_secrets(message)}. {hint}".rstrip()
        ) from None


def _check_text(values: Mapping[str, Any], origin: Mapping[str, str]) -> None:
    """Raises ConfigError for bytes in the environment or a flag that are not UTF-8, and for a name of no file."""
    for key, value in values.items():
        if isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError:
                raise ConfigError(f"{key} (from {origin[key]}) is not UTF-8 text") from None
    file = values.get("api_keys_file")
    if isinstance(file, str) and not file.strip():
        raise ConfigError(f"api_keys_file (from {origin['api_keys_file']}) is empty: name a file, or unset it")


def describe(config: ServerConfig, origin: dict[str, str]) -> str:
    """The result and where each value came from, as YAML."""
    lines = []
    for key in ServerConfig.model_fields:
        value = config.resolved(key)
        if key in PROFILE_KEYS and getattr(config, key) is None:
            source = f"profile {config.profile}"
        else:
            source = origin.get(key, "default")
        text = (
            yaml.safe_dump(
                masked_value(str(value) if isinstance(value, (Path, SecretStr)) else value),
                default_flow_style=True,
                width=10_000,
            )
            .removesuffix("...\n")
            .strip()
        )
        lines.append(f"{key}: {text}  # {source}")
    return "\n".join(lines) + "\n"


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description="Serves gpt-oss-20b and gpt-oss-120b to OpenAI clients.", allow_abbrev=False)
    parser.add_argument("--config", help="YAML file (default: configs/server_config.yaml)")
    parser.add_argument("--print-config", action="store_const", const=True, help="show the result and leave")
    for name, info in ServerConfig.model_fields.items():
        flag = "--" + name.replace("_", "-")
        text = (info.description or "").replace("%", "%%")
        if info.annotation in (bool, bool | None):
            parser.add_argument(flag, dest=name, action=_BooleanFlag, help=text)
        else:
            parser.add_argument(flag, dest=name, default=None, help=text)
    return parser


class _BooleanFlag(argparse.BooleanOptionalAction):
    """`--flag`, `--no-flag`, and `--flag VALUE` with a value as in YAML."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:
        super().__init__(option_strings, dest, default=None, help=help)
        self.nargs, self.metavar = "?", "true|false"

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        negated = option_string is not None and option_string.startswith("--no-")
        if values is None:
            setattr(namespace, self.dest, not negated)
            return
        if negated:
            parser.error(f"argument {option_string}: takes no value, got {values!r}")
        if values.lower() not in _BOOLEANS:
            parser.error(f"argument {option_string}: must be true or false, got {values!r}")
        setattr(namespace, self.dest, _BOOLEANS[values.lower()])


_BOOLEANS = {**dict.fromkeys(("true", "yes", "on", "1"), True), **dict.fromkeys(("false", "no", "off", "0"), False)}


def _from_yaml(path: Path) -> dict[str, Any]:
    values = read_yaml(path, str(path))
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold keys and values")
    blank = re.search(r"(?m)^(api_keys?(?:_file)?):[ \t]*(&\S*)?[ \t]*(#.*)?$", path.read_text(encoding="utf-8"))
    if blank is not None and values.get(blank[1]) is None:
        raise ConfigError(f"{blank[1]} (from {path}) has no value: write null to serve without it")
    return {str(key): value for key, value in values.items() if value is not None}


def _from_environment() -> dict[str, tuple[str, str]]:
    """Key -> (the variable's name, its text)."""
    values = {key: (name, os.environ[name]) for name, key in FOREIGN_ENV.items() if name in os.environ}
    for name, value in os.environ.items():
        if not name.startswith(ENV_PREFIX) or name in OTHER_PROGRAMS_ENV:
            continue
        if _describes_a_service(name, value):
            continue
        key = name.removeprefix(ENV_PREFIX).lower()
        if key not in ServerConfig.model_fields:
            raise ConfigError(f"environment variable {name}: unknown key {key!r}")
        values[key] = name, value
    return values


def service_variables() -> list[str]:
    """Names of the variables that Kubernetes set for Services and that the configuration ignores."""
    return sorted(name for name, value in os.environ.items() if _describes_a_service(name, value))


def _describes_a_service(name: str, value: str) -> bool:
    """Whether Kubernetes set the variable. Our port is a number, a Service's is an address."""
    if _KUBERNETES_ENV.fullmatch(name):
        return True
    is_address = value.startswith(("tcp://", "udp://", "sctp://"))
    return is_address and _KUBERNETES_PORT.fullmatch(name) is not None
