"""Measures the time to the first token of a conversation's later turns on a running server, or on two in turns.

    python bench/turns.py --url http://127.0.0.1:8000 [--vs http://127.0.0.1:8001]

Each conversation is new; its turns have lengths that are no multiples of a block of the KV cache. `text`: each prompt is the one
before and some words more. `chat`: an answer and a question more; the answers are ours, so that both servers read the same.
The first token is that of an answer of one token. With --vs the two take turns, conversation by conversation, and the last column is
first / second.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gptoss.cli.remote.load import WORDS

Bodies = Iterator[tuple[str, dict[str, Any]]]  # paths and the fields of a request
Turn = tuple[float, int, int]  # seconds, tokens of the prompt, how many of them were cached


def text_turns(rng: random.Random, first: int, more: int, turns: int) -> Bodies:
    prompt = " ".join(rng.choices(WORDS, k=first))
    for _ in range(turns):
        yield "/v1/completions", {"prompt": prompt, "max_tokens": 1}
        prompt += " " + " ".join(rng.choices(WORDS, k=more))


def chat_turns(rng: random.Random, first: int, more: int, turns: int) -> Bodies:
    messages = [{"role": "user", "content": " ".join(rng.choices(WORDS, k=first))}]
    for _ in range(turns):
        yield "/v1/chat/completions", {"messages": messages, "max_completion_tokens": 1}
        for role in ("assistant", "user"):
            messages.append({"role": role, "content": " ".join(rng.choices(WORDS, k=more // 2))})


KINDS: dict[str, Callable[[random.Random, int, int, int], Bodies]] = {"text": text_turns, "chat": chat_turns}


def measured(client: httpx.Client, url: str, model: str, path: str, body: dict[str, Any]) -> Turn:
    started = time.perf_counter()
    response = client.post(url + path, json={"model": model, "temperature": 0, **body})
    elapsed = time.perf_counter() - started
    if response.status_code != 200:
        sys.exit(f"error: {url}{path}: {response.status_code} {response.text[:500]}")
    usage = response.json()["usage"]
    return elapsed, usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]


def take_turns(
    client: httpx.Client, targets: list[tuple[str, str]], kind: str, more: int, args: argparse.Namespace
) -> tuple[list[list[Turn]], list[list[Turn]]]:
    """Returns the first and the later turns of each target (URL and model); the first conversation warms up."""
    first: list[list[Turn]] = [[] for _ in targets]
    later: list[list[Turn]] = [[] for _ in targets]
    for number in range(args.conversations + 1):
        seed = time.time()
        for side, target in sorted(enumerate(targets), reverse=number % 2 == 1):
            bodies = KINDS[kind](random.Random(seed), args.first + number, more, args.turns)
            found = [measured(client, *target, path, body) for path, body in bodies]
            if number:
                first[side].append(found[0])
                later[side].extend(found[1:])
    return first, later


def line(name: str, sides: list[list[Turn]]) -> str:
    """A row of the table: of each side the median in ms and the share of the prompts' tokens that it computed."""
    medians = [1e3 * statistics.median(s for s, _, _ in side) for side in sides]
    computed = [statistics.mean(tokens - cached for _, tokens, cached in side) for side in sides]
    cells = [f"{ms:.1f} | {number:.0f}" for ms, number in zip(medians, computed, strict=True)]
    return f"| {name} | {' | '.join(cells)} |" + (f" {medians[0] / medians[1]:.2f} |" if len(sides) == 2 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--vs", help="a second server, measured in turns with the first")
    parser.add_argument("--first", type=int, default=300, help="words of the first turn")
    parser.add_argument("--more", type=int, nargs="+", default=[5, 23, 90], help="words that each later turn adds")
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--conversations", type=int, default=9)
    args = parser.parse_args()
    urls = [args.url, *([args.vs] if args.vs else [])]
    head = "".join(" ms | computed tokens |" for _ in urls)
    print(f"| turns |{head}{' ratio |' if args.vs else ''}\n|---|{'---|---|' * len(urls)}{'---|' if args.vs else ''}")
    with httpx.Client(timeout=600) as client:
        targets = [(url, client.get(url + "/v1/models").raise_for_status().json()["data"][0]["id"]) for url in urls]
        for kind in KINDS:
            for more in args.more:
                first, later = take_turns(client, targets, kind, more, args)
                if more == args.more[0]:
                    print(line(f"{kind}, first, {args.first} words", first))
                print(line(f"{kind}, each later one, {more} words more", later), flush=True)


if __name__ == "__main__":
    main()
