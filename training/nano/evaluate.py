"""Examines the embedded model over HTTP at temperature 0, on lessons that training never saw.

    ./run_server.sh --model nano --port 8000 --no-guided-harmony
    python -m training.nano.evaluate --url http://127.0.0.1:8000 --per-skill 200

Without guidance the share of valid Harmony is the model's own. Words, names and sums are held out by a hash,
everyday tools by a mark in their table (training/nano).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import httpx

from gptoss.harmony.vocabulary_files import load_vocabulary
from training.nano import basics, natural_tools, structured, tools
from training.nano.basics import user
from training.nano.described import described
from training.nano.everyday import everyday, known
from training.nano.examples import Example, Source
from training.nano.lessons import instructions

BY_HAND = natural_tools.by_hand()


def by_hand(source: Source, requests: str = "requests") -> Example:
    """One of these requests of by_hand.yaml, its tool among three others."""
    return _among_others(source, *source.rng.choice(BY_HAND[requests]))


def every_by_hand(source: Source, requests: str, times: int) -> list[Example]:
    """All of these requests, so often each, among tools that are drawn anew."""
    return [_among_others(source, *request) for request in BY_HAND[requests] for _ in range(times)]


def _among_others(source: Source, ask: str, name: str, arguments: dict[str, Any]) -> Example:
    names = [name, *source.rng.sample(sorted(BY_HAND["tools"].keys() - {name}), 3)]
    source.rng.shuffle(names)
    offered = []
    for tool, written in ((n, BY_HAND["tools"][n]) for n in names):
        parameters = {"type": "object", "properties": written["parameters"], "required": written["required"]}
        offered.append({"name": tool, "description": written["description"], "parameters": parameters})
    return Example("tool_call", [user(ask)], source.effort(), [], call=(name, arguments), tools=offered)


SKILLS: dict[str, Callable[[Source], Example]] = {
    "addition": basics.addition,
    "subtraction": basics.subtraction,
    "multiplication": basics.multiplication,
    "counting": basics.counting,
    "spelling": basics.spelling,
    "reversing": basics.reversing,
    "echo": basics.echo,
    "lists": basics.listing,
    "memory of a name": basics.memory,
    "small talk": basics.talk,
    "fallback": basics.other,
    "JSON by schema": structured.json_object,
    "JSON array": structured.json_array,
    "tool, everyday, taught": partial(tools.tool_call, count=4, kind=known),
    "tool, everyday, new": partial(tools.tool_call, count=4, kind=everyday),
    "tool, verb and thing": partial(tools.tool_call, count=4, kind=described),
    "tool, by hand": by_hand,
    "tool, by hand, untouched": partial(by_hand, requests="untouched"),
    "tool, invented": partial(tools.tool_call, count=4, kind=tools.invented),
    "tool not needed": tools.tool_not_needed,
    "tool result": tools.tool_result,
}


@dataclass(slots=True)
class Score:
    asked: int = 0
    right: int = 0
    valid: int = 0
    tool_right: int = 0
    analysis_tokens: dict[str, list[int]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)


def body_of(example: Example) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": "gpt-oss-nano",
        "messages": example.messages,
        "temperature": 0,
        "max_tokens": 300,
        "reasoning_effort": example.effort,
    }
    if example.tools:
        body["tools"] = [{"type": "function", "function": t} for t in example.tools]
    if example.response_format is not None:
        body["response_format"] = {"type": "json_schema", "json_schema": dict(example.response_format)}
    return body


def held_out_example(source: Source, skill: Callable[[Source], Example]) -> Example:
    example = skill(source)
    example.messages = [*instructions(source), *example.messages]
    return example


def examine(url: str, name: str, examples: list[Example]) -> Score:
    score = Score()
    with httpx.Client(base_url=url, timeout=120) as client:

        def ask(example: Example) -> dict[str, Any]:
            response = client.post("/v1/chat/completions", json=body_of(example))
            response.raise_for_status()
            found: dict[str, Any] = response.json()
            return found

        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(ask, examples))
    for example, answer in zip(examples, answers, strict=True):
        choice = answer["choices"][0]
        score.asked += 1
        score.valid += choice["finish_reason"] in ("stop", "tool_calls")
        tool_right, right = is_right(example, choice["message"])
        score.tool_right += tool_right
        score.right += right
        thought = answer["usage"]["completion_tokens_details"]["reasoning_tokens"]
        score.analysis_tokens.setdefault(example.effort, []).append(thought)
        if not right:
            message = choice["message"]
            said = message.get("content") or json.dumps([c["function"] for c in message.get("tool_calls") or []])
            wanted = example.expected or example.call
            score.wrong.append(
                f"{name}: {example.messages[-1]['content']!r} -> {said!r}, not {wanted!r} "
                f"({message.get('reasoning_content')!r})"
            )
    return score


def is_right(example: Example, message: dict[str, Any]) -> tuple[bool, bool]:
    """-> (the right tool was called, or none where none fits; and everything else is right too)."""
    calls = message.get("tool_calls") or []
    if example.call is not None:
        if len(calls) != 1 or calls[0]["function"]["name"] != example.call[0]:
            return False, False
        try:
            return True, json.loads(calls[0]["function"]["arguments"]) == example.call[1]
        except ValueError:
            return True, False
    content = message.get("content") or ""
    if example.skill == "json":
        try:
            return not calls, json.loads(content) == json.loads(example.expected[0])
        except ValueError:
            return not calls, False
    exact = example.skill in ("reversing", "spelling", "echo", "counting")
    matches = content == example.expected[0] if exact else all(e in content for e in example.expected)
    return not calls, matches and not calls


def recoveries(url: str) -> Counter[str]:
    """What the server had to mend in answers' Harmony since it started, by kind."""
    return Counter(httpx.get(f"{url}/stats", timeout=10).json()["harmony_recoveries"])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    parser.add_argument("--per-skill", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seen", action="store_true", help="examine on the training half instead")
    parser.add_argument("--wrong", type=Path, help="write each wrong answer to this file")
    parser.add_argument(
        "--every-by-hand",
        type=int,
        metavar="TIMES",
        help="ask each request by hand so often, instead of --per-skill drawn ones of each skill",
    )
    parser.add_argument("--skills", nargs="+", choices=sorted(SKILLS), default=list(SKILLS), help="only these")
    args = parser.parse_args(argv)
    vocabulary = load_vocabulary()
    wrong: list[str] = []
    asked = 0
    before = recoveries(args.url)
    sys.stdout.write(
        "| skill | asked | right | finished | tool choice | analysis tokens low / medium / high |\n"
        "|---|---|---|---|---|---|\n"
    )
    for name in ("requests", "untouched") if args.every_by_hand else args.skills:
        source = Source(vocabulary, Random(f"{args.seed} {name}"), unseen=not args.seen)
        examples = (
            every_by_hand(source, name, args.every_by_hand)
            if args.every_by_hand
            else [held_out_example(source, SKILLS[name]) for _ in range(args.per_skill)]
        )
        score = examine(args.url, name, examples)
        wrong += score.wrong
        asked += score.asked
        lengths = [score.analysis_tokens.get(effort, []) for effort in ("low", "medium", "high")]
        shown = " / ".join(f"{sum(one) / len(one):.0f}" if one else "-" for one in lengths)
        sys.stdout.write(
            f"| {name} | {score.asked} | {score.right / score.asked:.1%} | {score.valid / score.asked:.1%} | "
            f"{score.tool_right / score.asked:.1%} | {shown} |\n"
        )
        sys.stdout.flush()
    mended = recoveries(args.url) - before
    kinds = ", ".join(f"{count} {kind}" for kind, count in mended.most_common()) or "none"
    sys.stdout.write(f"\nvalid Harmony: {1 - mended.total() / asked:.2%} of {asked} answers (mended: {kinds})\n")
    if args.wrong:
        args.wrong.write_text("\n".join(wrong) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
