"""What is reported of a checkpoint's tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gptoss.harmony.tokenizer_files import TOKENIZER_CONFIG, tokenizer_config


def test_a_checkpoints_own_configuration_and_template_are_reported(tmp_path: Path) -> None:
    own = {"tokenizer_class": "TokenizersBackend", "eos_token": "<|return|>", "more": [1]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(own))
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    found = tokenizer_config(tmp_path)
    assert found == TOKENIZER_CONFIG | own | {"chat_template": "{{ messages }}"}


@pytest.mark.parametrize("text", [None, "", "[1]", '{"a": ', "\\xff"])
def test_without_a_readable_file_it_is_what_holds_for_every_gpt_oss(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "tokenizer_config.json").write_bytes(text.encode("latin-1"))
    assert tokenizer_config(tmp_path) == tokenizer_config(None) == TOKENIZER_CONFIG
