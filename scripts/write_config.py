"""Writes configs/server_config.yaml and the tables of docs/configuration.md from the groups of keys in src/config.

python scripts/write_config.py
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pydantic.fields import FieldInfo

from gptoss.config.profiles import PROFILES, Profile
from gptoss.config.schema import GROUPS, KEYS
from gptoss.config.sources import DEFAULT_CONFIG_FILE
from gptoss.config.text import yaml_value

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"
YAML_HEAD = """\
# Every key with its default, written by scripts/write_config.py. Environment variables (GPTOSS_<KEY>) and flags
# (--<key-with-dashes>) beat this file. null: not set; the comment says what applies then. docs/configuration.md has the
# types and bounds.
"""
UNITS = {"_s": "seconds", "_bytes": "bytes", "_gib": "GiB"}
TYPES = {bool: "boolean", int: "integer", float: "number", Path: "path"}
SIGNS = {"ge": "≥", "gt": ">", "le": "≤"}


def outputs() -> dict[Path, str]:
    """Returns the text of each file that is made from the keys."""
    return {DEFAULT_CONFIG_FILE: yaml_text(), PAGE: page_text(PAGE.read_text())}


def yaml_text() -> str:
    sections = [YAML_HEAD]
    for group in GROUPS:
        lines = [f"{name}: {_default(KEYS[name])}  # {_comment(KEYS[name])}" for name in group.__dataclass_fields__]
        sections.append("\n".join((f"# --- {group.__doc__}", *lines, "")))
    return "\n".join(sections)


def page_text(page: str) -> str:
    """Returns the page with its generated parts renewed; the text around them is written by hand."""
    for name, text in (("keys", key_tables()), ("profiles", profile_table())):
        part = re.compile(rf"(<!-- {name}: .*? -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
        page, found = part.subn(lambda match, text=text: f"{match[1]}\n{text}\n{match[2]}", page)
        assert found == 1, f"{PAGE.name} has no part '{name}'"
    return page


def key_tables() -> str:
    """Returns a heading and a Markdown table for each group."""
    parts = []
    for group in GROUPS:
        title = str(group.__doc__)
        rows = [_row(name, KEYS[name]) for name in group.__dataclass_fields__]
        head = ["| key | type | default | meaning |", "|---|---|---|---|"]
        parts.append("\n".join((f"### {title.capitalize()}", "", *head, *rows, "")))
    return "\n".join(parts)


def profile_table() -> str:
    """Returns a Markdown table of the three profiles."""
    lines = ["| setting | " + " | ".join(f"`{name}`" for name in PROFILES) + " |", "|---|" + "---|" * len(PROFILES)]
    for field in Profile.__dataclass_fields__:
        if field != "name":
            values = [_as_yaml(getattr(profile, field)) for profile in PROFILES.values()]
            lines.append(f"| `{field}` | " + " | ".join(map(_code, values)) + " |")
    return "\n".join(lines) + "\n"


def _row(name: str, info: FieldInfo) -> str:
    meaning = (info.description or "").replace("|", "\\|").replace("<", "&lt;")
    return f"| `{name}` | {_type(name, info)} | {_code(_default(info))} | {meaning} |"


def _default(info: FieldInfo) -> str:
    return _as_yaml(info.get_default(call_default_factory=True))


def _as_yaml(value: Any) -> str:
    return yaml_value(list(value) if isinstance(value, tuple) else value)


def _comment(info: FieldInfo) -> str:
    choices = get_args(info.annotation) if get_origin(info.annotation) is Literal else ()
    return f"{info.description}" + (f" ({' | '.join(choices)})" if choices else "")


def _type(name: str, info: FieldInfo) -> str:
    """Returns a key's type with its bounds and its unit, as in "number > 0, seconds"."""
    annotation = info.annotation
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(annotation))
    kinds = [get_origin(kind) or kind for kind in get_args(annotation) or (annotation,) if kind is not type(None)]
    kind = get_origin(annotation) if get_origin(annotation) in (list, dict) else kinds[0]
    text = {list: "list", dict: "table"}.get(kind) or TYPES.get(kind, "text")
    bounds = [
        f"{SIGNS[sign]} {getattr(bound, sign):g}" for bound in info.metadata for sign in SIGNS if hasattr(bound, sign)
    ]
    unit = next((unit for suffix, unit in UNITS.items() if name.endswith(suffix)), None)
    return " ".join((text, *([", ".join(bounds)] if bounds else []))) + (f", {unit}" if unit else "")


def _code(text: str) -> str:
    return "-" if text == "null" else f"`{text}`"


def main() -> None:
    for path, text in outputs().items():
        path.write_text(text)


if __name__ == "__main__":
    main()
