"""Prompts as transformers' tokenizer and another process make them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from transformers import AutoTokenizer

from gptoss.harmony.special_tokens import CALL
from tests.quick.test_prompt_builder import CALLING, RESULT, TOOL, USER, VOCABULARY, builder
from tests.support.conversations import conversation
from tests.support.vocabulary import tokenizer_folder

ROOT = Path(__file__).resolve().parents[2]


def test_our_tokenizer_files_give_transformers_the_same_ids() -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder())
    sample = "Hello wörld, it's 12345 o'clock!\n\n\tdef f(x):\n    return x**2  # 日本語 🤖  "
    assert tokenizer.encode(sample, add_special_tokens=False) == VOCABULARY.encode(sample)
    assert tokenizer.convert_tokens_to_ids("<|call|>") == CALL


def test_the_same_input_gives_the_same_ids_in_another_process() -> None:
    code = (
        "from gptoss.harmony.conversation import *; from gptoss.harmony.vocabulary_files import load_vocabulary;"
        "from gptoss.prompt_builder import PromptBuilder;"
        f"said = {conversation([USER, CALLING, RESULT])!r};"
        f"print(PromptBuilder(load_vocabulary()).build(said, tools={[TOOL]!r}).token_ids)"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed, "TZ": zone, "LANG": "C"},
        ).stdout
        for seed, zone in (("1", "UTC"), ("2", "Asia/Tokyo"))
    }
    assert runs == {f"{builder().build([USER, CALLING, RESULT], tools=[TOOL]).token_ids}\n"}
