"""Measures what draft tokens save: sends the same questions alternately to a server with drafts and one without.

Their answers must be equal.

    ./run_server.sh --model nano --port 8000
    ./run_server.sh --model nano --port 8001 --num-speculative-tokens 0
    python bench/drafts.py --drafts http://127.0.0.1:8000 --plain http://127.0.0.1:8001

The questions are the embedded model's test set, one stream, alternating between temperature 0 and 1. The second round
repeats them, as agents and retries do. With `--speculative-model` on the first server, its head's guesses are counted too.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gptoss.harmony.vocabulary_files import load_vocabulary
from training.nano.evaluate import SKILLS, body_of, held_out_example
from training.nano.examples import Source


def ask(client: httpx.Client, body: dict[str, Any]) -> tuple[float, int, str]:
    """-> (seconds, tokens, the answer without its ids)."""
    started = time.perf_counter()
    answer = client.post("/v1/chat/completions", json=body).raise_for_status().json()
    seconds = time.perf_counter() - started
    choice = answer["choices"][0]
    for call in choice["message"].get("tool_calls") or []:
        call.pop("id")
    return seconds, answer["usage"]["completion_tokens"], repr(choice)


def drafts_of(client: httpx.Client) -> tuple[int, int, int, int]:
    """-> guesses and right ones, of all sources and of the draft head."""
    found = client.get("/stats").json()["speculation"]
    return tuple(found[f"{source}{name}_tokens"] for source in ("", "head_") for name in ("draft", "accepted"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drafts", required=True, help="URL of the server that guesses")
    parser.add_argument("--plain", required=True, help="URL of the one that does not")
    parser.add_argument("--per-skill", type=int, default=4)
    args = parser.parse_args()
    vocabulary = load_vocabulary()
    bodies = []
    for name, skill in SKILLS.items():
        source = Source(vocabulary, Random(f"drafts {name}"), unseen=True)
        for number in range(args.per_skill):
            body = body_of(held_out_example(source, skill))
            bodies.append(body | {"temperature": number % 2, "seed": number})
    sides = [httpx.Client(base_url=url, timeout=120) for url in (args.drafts, args.plain)]
    for client in sides:
        ask(client, bodies[0])
    print(f"{'':14} {'drafts':>12} {'plain':>12} ratio  right guesses")
    for round_name in ("new questions", "asked again"):
        before = drafts_of(sides[0])
        seconds, tokens = [0.0, 0.0], 0
        for body in bodies:
            (one, count, first), (other, _, second) = (ask(client, body) for client in sides)
            if first != second:
                print(f"answers differ: {first} and {second}")
                return 1
            seconds = [seconds[0] + one, seconds[1] + other]
            tokens += count
        drafted, right, of_head, right_of_head = (
            after - start for after, start in zip(drafts_of(sides[0]), before, strict=True)
        )
        rates = [tokens / s for s in seconds]
        print(
            f"{round_name:14} {rates[0]:7.0f} tok/s {rates[1]:6.0f} tok/s {rates[0] / rates[1]:5.2f}  "
            f"{right} of {drafted}, {right / tokens:.0%} of {tokens} tokens; the head's {right_of_head} of {of_head}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
