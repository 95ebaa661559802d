"""Merges the sources of the configuration: flags beat the environment, which beats one YAML file.

Every key of ServerConfig is a YAML key, an environment variable GPTOSS_<KEY> and a flag --<key-with-dashes>. A key that
is not set takes the profile's value if the profile has one, else its default.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import SecretStr, ValidationError
from pydantic.fields import FieldInfo

from gptoss.config.errors import ConfigError
from gptoss.config.schema import ENV_PREFIX, GROUPS, KEYS, PATHS_KEYS, PROFILE_KEYS, SECRET_KEYS, ServerConfig
from gptoss.config.text import (
    Parser,
    masked_value,
    quoted_value,
    read_yaml,
    shown_name,
    without_secrets,
    yaml_value,
)
from gptoss.resources import resource

DEFAULT_CONFIG_FILE = resource("configs", "server_config.yaml")
# Other tools' names for our keys. GPTOSS_<KEY> beats them.
FOREIGN_ENV = {"TORCH_DTYPE": "dtype"}
# torchrun's names; read only where TORCHELASTIC_RUN_ID shows that it started this process
TORCHRUN_ENV = {
    "MASTER_ADDR": "master_addr",
    "MASTER_PORT": "master_port",
    "GROUP_WORLD_SIZE": "nnodes",
    "GROUP_RANK": "node_rank",
}
# Read by other programs of the project (the command-line client, the tests), not by the server.
OTHER_PROGRAMS_ENV = frozenset({"GPTOSS_CONFIG", "GPTOSS_URL", "GPTOSS_TEST_CACHE"})
# Kubernetes sets variables in every pod for each Service of the namespace: here for one named gptoss or gptoss-<name>.
_KUBERNETES_ENV = re.compile(
    r"GPTOSS(_[A-Z0-9_]+)?"
    r"(_SERVICE_HOST|_SERVICE_PORT(_[A-Z0-9_]+)?|_PORT_\d+_(TCP|UDP|SCTP)(_PORT|_PROTO|_ADDR)?)"
)
_KUBERNETES_PORT = re.compile(r"GPTOSS(_[A-Z0-9_]+)?_PORT")


def load_config(argv: list[str] | None = None) -> tuple[ServerConfig, dict[str, str], bool]:
    """Returns the configuration, the source of each key that is set, and whether --print-config was given.

    Raises:
        ConfigError: an unknown key or an invalid value; the message names the key and its source.
    """
    return load_flags(vars(flag_parser().parse_args(argv)))


def load_flags(given: Mapping[str, Any]) -> tuple[ServerConfig, dict[str, str], bool]:
    """Returns what `load_config` does, for the values of the flags of `add_flags`; None: not given."""
    flags = {k: v for k, v in given.items() if v is not None}
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
        raise _config_error(error, origin) from None


def _config_error(error: ValidationError, origin: Mapping[str, str]) -> ConfigError:
    """Returns pydantic's first error with the key's source, without quoting a secret."""
    first = error.errors()[0]
    key = str(first["loc"][0]) if first["loc"] else "configuration"
    if first["type"] == "unexpected_keyword_argument":
        name, message, hint = shown_name(key), "unknown key", f" known keys: {', '.join(KEYS)}"
    else:
        name, message, hint = key, first["msg"].removeprefix("Value error, "), ""
        if key == "api_key" and first["type"] == "string_type":
            message += ": put the key in quotes"
        if len(first["loc"]) == 1 and key not in SECRET_KEYS:
            message += quoted_value(first["input"])
    return ConfigError(f"{name} (from {origin.get(key, 'defaults')}): {without_secrets(message)}.{hint}")


def _check_text(values: Mapping[str, Any], origin: Mapping[str, str]) -> None:
    """Raises ConfigError for text that is not UTF-8, and for paths that must not be empty.

    The values are those of the environment and of flags.
    """
    for key, value in values.items():
        if isinstance(value, str) or key in PATHS_KEYS:
            try:
                str(value).encode()
            except UnicodeEncodeError:
                raise ConfigError(f"{key} (from {origin[key]}) is not UTF-8 text") from None
    for key, what in (("api_keys_file", "file"), ("speculative_model", "folder")):
        path = values.get(key)
        if isinstance(path, str) and not path.strip():
            raise ConfigError(f"{key} (from {origin[key]}) is empty: name a {what}, or unset it")


def describe(config: ServerConfig, origin: Mapping[str, str]) -> str:
    """Returns every key with its value and the source of that value, as YAML."""
    lines = []
    for key in KEYS:
        value = config.resolved(key)
        if key in PROFILE_KEYS and getattr(config, key) is None:
            source = f"profile {config.profile}"
        else:
            source = origin.get(key, "default")
        shown = masked_value(str(value) if isinstance(value, (Path, SecretStr)) else value)
        lines.append(f"{key}: {yaml_value(shown)}  # {source}")
    return "\n".join(lines) + "\n"


def flag_parser() -> argparse.ArgumentParser:
    """Returns a parser with one flag per key, in the groups of the schema."""
    parser = Parser(
        usage="%(prog)s [flags]",
        description="Serves gpt-oss-20b and gpt-oss-120b to OpenAI clients.",
        epilog="Every flag is also a key of the YAML file and an environment variable: --max-num-seqs, max_num_seqs, "
        "GPTOSS_MAX_NUM_SEQS. docs/configuration.md lists them all.",
        allow_abbrev=False,
    )
    add_flags(parser)
    parser.add_argument(
        "--print-config", action="store_const", const=True, help="print every key with its value and source, and exit"
    )
    return parser


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds --config and a flag for each key, in the groups of the schema."""
    parser.add_argument("--config", metavar="FILE", help="YAML file (default: configs/server_config.yaml)")
    for group in GROUPS:
        section = parser.add_argument_group(group.__doc__)
        for name in group.__dataclass_fields__:
            _add_flag(section, name, KEYS[name])


def _add_flag(section: argparse._ArgumentGroup, name: str, info: FieldInfo) -> None:
    flag = "--" + name.replace("_", "-")
    default = info.get_default(call_default_factory=True)
    text = (info.description or "") + ("" if default is None else f" (default: {yaml_value(default)})")
    text = text.replace("%", "%%")
    if info.annotation in (bool, bool | None):
        section.add_argument(flag, dest=name, action=_BooleanFlag, help=text)
    elif name in PATHS_KEYS:
        section.add_argument(flag, dest=name, action="append", metavar="NAME=PATH", help=text)
    else:
        section.add_argument(flag, dest=name, metavar=_metavar(info.annotation), help=text)


def _metavar(annotation: Any) -> str:
    """Returns what `--help` shows for a value: its alternatives or its type."""
    kinds = [kind for kind in get_args(annotation) or (annotation,) if kind is not type(None)]
    if get_origin(annotation) is Literal:
        return f"{{{','.join(kinds)}}}"
    if get_origin(annotation) in (dict, list) or get_origin(kinds[0]) in (dict, list):
        return "YAML"
    return {int: "N", float: "X", Path: "PATH"}.get(kinds[0], "TEXT")


class _BooleanFlag(argparse.BooleanOptionalAction):
    """Accepts `--flag`, `--no-flag`, and `--flag VALUE` with a boolean of YAML."""

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
    """Returns the file's keys that are not null."""
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
    """Returns the name and the text of the variable that sets each key."""
    foreign = FOREIGN_ENV | (TORCHRUN_ENV if "TORCHELASTIC_RUN_ID" in os.environ else {})
    values = {key: (name, os.environ[name]) for name, key in foreign.items() if name in os.environ}
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _check_torchrun(values)
    for name, value in os.environ.items():
        if not name.startswith(ENV_PREFIX) or name in OTHER_PROGRAMS_ENV:
            continue
        if _describes_a_service(name, value):
            continue
        key = name.removeprefix(ENV_PREFIX).lower()
        if key not in KEYS:
            raise ConfigError(f"environment variable {name}: unknown key {key!r}")
        values[key] = name, value
    return values


def _check_torchrun(values: dict[str, tuple[str, str]]) -> None:
    """Raises ConfigError if torchrun starts several processes on a host. Avoids its own port."""
    if os.environ.get("LOCAL_WORLD_SIZE", "1") != "1":
        raise ConfigError("torchrun starts several servers on this host: use --nproc-per-node 1; they start the ranks")
    name, port = values.get("master_port", ("", ""))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and port.isdecimal():
        values["master_port"] = name, str(int(port) + 1)


def service_variables() -> list[str]:
    """Returns the names of the variables that Kubernetes set for Services; the configuration ignores them."""
    return sorted(name for name, value in os.environ.items() if _describes_a_service(name, value))


def _describes_a_service(name: str, value: str) -> bool:
    """Returns whether Kubernetes set the variable. Our port is a number; a Service's is an address."""
    if _KUBERNETES_ENV.fullmatch(name):
        return True
    is_address = value.startswith(("tcp://", "udp://", "sctp://"))
    return is_address and _KUBERNETES_PORT.fullmatch(name) is not None
