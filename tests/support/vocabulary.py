"""The public vocabulary, read once for all tests of a process, and its files as a checkpoint has them."""

from __future__ import annotations

import contextlib
import functools
import tempfile
from pathlib import Path

from gptoss.harmony.tokenizer_files import write_tokenizer
from gptoss.harmony.vocabulary_files import Vocabulary, load_vocabulary
from tests.support.caches import CHECKPOINTS


@functools.cache
def public_vocabulary() -> Vocabulary:
    return load_vocabulary()


def tokenizer_folder() -> Path:
    """A folder with the tokenizer files of a checkpoint and nothing else, written at the first call."""
    folder = CHECKPOINTS / "tokenizer-1"
    if not (folder / "tokenizer.json").is_file():
        CHECKPOINTS.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CHECKPOINTS) as temporary:
            made = Path(temporary) / "made"
            made.mkdir()
            write_tokenizer(made, public_vocabulary().token_bytes)
            with contextlib.suppress(OSError):  # another process was first
                made.rename(folder)
    return folder
