"""Writes configs/server_config.yaml: every key of ServerConfig with its default and its description."""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gptoss.config.schema import ServerConfig
from gptoss.config.sources import DEFAULT_CONFIG_FILE

SECTIONS = {
    "host": "serving",
    "profile": "model",
    "max_model_len": "engine",
    "guided_harmony": "prompts and answers",
    "log_level": "logs",
}
HEAD = """\
# Every key, with its default. Environment variables (GPTOSS_<KEY>) and flags (--<key-with-dashes>) beat this file.
# null: the profile's value where the profile has one, else what the comment says.
"""


def main() -> None:
    lines = [HEAD]
    for key, field in ServerConfig.model_fields.items():
        if key in SECTIONS:
            lines += ([""] if len(lines) > 1 else []) + [f"# --- {SECTIONS[key]}"]
        value = yaml.safe_dump(field.default, default_flow_style=True, width=10_000).removesuffix("...\n").strip()
        lines.append(f"{key}: {value}  # {field.description}")
    DEFAULT_CONFIG_FILE.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
