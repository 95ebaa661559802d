"""Jobs and their runner with a dispatcher that answers by a script: each request gets exactly one line."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptoss.api.batches.run.job import BatchJob
from gptoss.api.batches.run.runner import MAX_ATTEMPTS, BatchRunner
from gptoss.api.dispatch import Answer
from gptoss.api.http.sender import Sender

URL = "/v1/chat/completions"
OK = Answer(200, b'{"usage": {"prompt_tokens": 3, "completion_tokens": 2}}', "req_1")
REFUSED = Answer(400, b'{"error": {"message": "No."}}', "req_1")
FAILED = Answer(500, b'{"error": {"message": "NaN"}}', "req_1", failed=True)
AWAY = Answer(503, b'{"error": {"message": "loading"}}', "req_1", unavailable=True)
GONE = Answer(503, b'{"error": {"message": "the engine is dead"}}', "req_1", unavailable=True, gone=True)


class Script:
    """Answers requests by their custom id, which their body repeats."""

    def __init__(self, answer: Callable[[str, int], Answer] = lambda name, attempt: OK) -> None:
        self._answer = answer
        self.attempts: Counter[str] = Counter()
        self.order: list[str] = []
        self.running = self.most = 0
        self.hold: asyncio.Event | None = None

    async def answer(self, url: str, body: dict[str, Any], sender: Sender) -> Answer:
        name = body["name"]
        self.attempts[name] += 1
        self.order.append(name)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await asyncio.sleep(0)
            if self.hold is not None:
                await self.hold.wait()
            return self._answer(name, self.attempts[name])
        finally:
            self.running -= 1


def write_input(path: Path, names: list[str]) -> None:
    lines = ({"custom_id": n, "method": "POST", "url": URL, "body": {"model": "m", "name": n}} for n in names)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def make_job(folder: Path, names: list[str], owner: str = "a") -> BatchJob:
    source = folder / f"{owner}-in.jsonl"
    write_input(source, names)
    paths = folder / f"{owner}-out.jsonl", folder / f"{owner}-err.jsonl"
    job = BatchJob(source, *paths, endpoint=URL, max_line_bytes=10_000, owner=owner)
    job.recover(len(names))
    return job


def make_runner(script: Script, window: int = 4, **options: Any) -> BatchRunner:
    return BatchRunner(script, window, retry_s=0.001, **options)  # type: ignore[arg-type]


def ids(folder: Path, kind: str, owner: str = "a") -> list[str]:
    path = folder / f"{owner}-{kind}.jsonl"
    return [json.loads(line)["custom_id"] for line in path.read_text().splitlines()] if path.exists() else []


async def run(runner: BatchRunner, *jobs: BatchJob) -> None:
    runner.start()
    for job in jobs:
        runner.add(job)
    await asyncio.wait_for(asyncio.gather(*(job.ended.wait() for job in jobs)), 10)
    await runner.stop()


NAMES = [f"r{i}" for i in range(30)]


async def test_each_request_gets_one_line_in_the_right_file(tmp_path: Path) -> None:
    script = Script(lambda name, _: REFUSED if name in ("r3", "r7") else OK)
    job = make_job(tmp_path, NAMES)
    await run(make_runner(script), job)
    assert sorted(ids(tmp_path, "out") + ids(tmp_path, "err")) == sorted(NAMES)
    assert ids(tmp_path, "err") == ["r3", "r7"]
    assert (job.counts.total, job.counts.completed, job.counts.failed) == (30, 28, 2)
    assert job.usage.shown()["total_tokens"] == 28 * 5
    assert script.most == 4 and set(script.attempts.values()) == {1}


async def test_an_engine_that_is_away_is_waited_for(tmp_path: Path) -> None:
    script = Script(lambda _, attempt: AWAY if attempt < 6 else OK)
    job = make_job(tmp_path, ["x"])
    await run(make_runner(script), job)
    assert script.attempts["x"] == 6 and ids(tmp_path, "out") == ["x"]


async def test_a_request_that_the_engine_fails_is_repeated_a_few_times(tmp_path: Path) -> None:
    script = Script(lambda name, attempt: FAILED if name == "bad" or attempt == 1 else OK)
    job = make_job(tmp_path, ["bad", "good"])
    await run(make_runner(script), job)
    assert script.attempts == {"bad": MAX_ATTEMPTS, "good": 2}
    assert (ids(tmp_path, "out"), ids(tmp_path, "err")) == (["good"], ["bad"])


async def test_without_a_server_a_dead_engine_ends_the_job(tmp_path: Path) -> None:
    job = make_job(tmp_path, NAMES)
    await run(make_runner(Script(lambda *_: GONE), waits_for_engine=False), job)
    assert "the engine is dead" in str(job.failure)
    assert ids(tmp_path, "out") + ids(tmp_path, "err") == []


async def test_owners_take_turns_and_an_owners_jobs_run_in_order(tmp_path: Path) -> None:
    script = Script()
    jobs = [make_job(tmp_path, [f"{owner}{i}" for i in range(10)], owner) for owner in "ab"]
    (tmp_path / "later").mkdir()
    later = make_job(tmp_path / "later", ["later"], "a")
    await run(make_runner(script, 1), jobs[0], later, jobs[1])
    assert [name[0] for name in script.order[:20]] == list("ab" * 10)
    assert script.order[20:] == ["later"]


async def test_no_request_is_taken_while_live_ones_run(tmp_path: Path) -> None:
    script, idle = Script(), False
    runner, job = make_runner(script, is_idle=lambda: idle), make_job(tmp_path, NAMES)
    runner.start()
    runner.add(job)
    await asyncio.sleep(0.1)
    assert not script.order
    idle = True
    await asyncio.wait_for(job.ended.wait(), 10)
    await runner.stop()
    assert len(script.order) == 30


async def test_a_job_that_is_stopped_and_recovered_answers_each_request_once(tmp_path: Path) -> None:
    """Stopped at a different moment each time, with half a line left behind."""
    for round_number in range(1, 60):
        script = Script()
        job, runner = make_job(tmp_path, NAMES), make_runner(script)
        already = job.num_written
        runner.start()
        runner.add(job)
        for _ in range(3 * round_number % 17):
            await asyncio.sleep(0)
        runner.remove(job)
        await job.stop()
        await runner.stop()
        assert job.num_written >= already
        written = ids(tmp_path, "out")
        assert len(written) == len(set(written)) == job.num_written
        if job.num_written == 30:
            break
        with (tmp_path / "a-out.jsonl").open("a") as file:
            file.write('{"custom_id": "r1')
    job = make_job(tmp_path, NAMES)
    assert job.counts.completed == job.num_written
    await run(make_runner(Script()), job)
    assert sorted(ids(tmp_path, "out")) == sorted(NAMES)
    assert job.usage.shown()["total_tokens"] == 30 * 5


async def test_what_was_not_run_is_written_once_even_if_an_answer_is_being_written(tmp_path: Path) -> None:
    script = Script()
    job, runner = make_job(tmp_path, NAMES), make_runner(script)
    runner.start()
    runner.add(job)
    while not script.order:
        await asyncio.sleep(0)
    for _ in range(3):  # answers are on their way to the disk
        await asyncio.sleep(0)
    runner.remove(job)
    await job.stop()
    await runner.stop()
    left = await job.write_unanswered("batch_cancelled", "Cancelled.")
    assert left == len(ids(tmp_path, "err")) == job.counts.failed > 0
    assert sorted(ids(tmp_path, "out") + ids(tmp_path, "err")) == sorted(NAMES)


@pytest.mark.parametrize("broken", ["read", "write"])
async def test_a_file_that_cannot_be_used_ends_the_job(
    tmp_path: Path, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(tmp_path, NAMES)
    if broken == "read":
        with (tmp_path / "a-in.jsonl").open("r+b") as file:
            file.write(b"{{{{")
    else:
        (tmp_path / "a-out.jsonl").mkdir()
    await run(make_runner(Script()), job)
    assert job.failure is not None
    await job.stop()
