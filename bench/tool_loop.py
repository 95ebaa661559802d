"""The overhead of a round of an answer with tools: what the loop adds to the engine and to the tool.

python bench/tool_loop.py

An engine that answers at once and a tool that returns at once leave what the rounds themselves take: reading the call,
running it, the next prompt, the next engine request. Two measurements alternate: answers of one round without a tool, and
of several rounds; the difference per round is the overhead.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gptoss.generation.tool_types import ToolCall, ToolResult
from tests.support.loop_setting import Setting
from tests.support.script import call_builtin, say
from tests.support.tools import FakeRunner
from tests.support.vocabulary import public_vocabulary

ROUNDS, REPEATS = 8, 30
LENGTHS = {"short results": 200, "results of 8 KB": 8_000, "results of 64 KB": 64_000}
SEARCH = call_builtin("browser.search", '{"query": "x"}')


async def answer_s(rounds: int, length: int) -> float:
    """Seconds of an answer with so many calls, each with a result of `length` characters."""
    text = "word " * (length // 5)

    async def reply(call: ToolCall) -> ToolResult:
        return ToolResult.of_text(text)

    setting = Setting([*[SEARCH] * rounds, say("Done.")], FakeRunner(does=reply), max_model_len=400_000)
    setting.engine.lists_prefixes = False  # which the script would compute in each round
    loop = setting.loop()
    began = time.perf_counter()
    await loop.begin()
    async for _ in loop.events():
        pass
    return time.perf_counter() - began


def encode_s(length: int) -> float:
    """Seconds in which a result of so many characters becomes tokens."""
    text = "word " * (length // 5)
    began = time.perf_counter()
    public_vocabulary().encode(text)
    return time.perf_counter() - began


async def main() -> None:
    for name, length in LENGTHS.items():
        plain, rounds, encoded = [], [], []
        for _ in range(REPEATS):
            plain.append(await answer_s(0, length))
            rounds.append(await answer_s(ROUNDS, length))
            encoded.append(encode_s(length))
        each = (statistics.median(rounds) - statistics.median(plain)) / ROUNDS * 1e3
        tokens = statistics.median(encoded) * 1e3
        print(f"{name:18} {each:6.2f} ms a round, of which the result's tokens take {tokens:.2f} ms")
    print(f"medians of {REPEATS} alternating runs of {ROUNDS} rounds and of none")


if __name__ == "__main__":
    asyncio.run(main())
