"""Answers a file of requests in the format of OpenAI's batches, with its own engine and no server.

    gptoss batch run requests.jsonl answers.jsonl [--errors FILE] [options of gptoss serve]

Each line of the input has custom_id, method (POST), url and body. Each request gets one line in the output, in any
order. The same command continues a run that was interrupted.

exit codes: 0 all answered, 1 some answers are errors, 2 usage or input file, 130 interrupted
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import fcntl
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from gptoss import launcher, logging_setup, startup
from gptoss.api.batches.run.job import BatchJob
from gptoss.api.batches.run.lines import Checked, check_file
from gptoss.api.batches.run.runner import BatchRunner
from gptoss.api.dispatch import URLS, Dispatcher, create_dispatcher
from gptoss.cached_files import CacheError
from gptoss.cli.remote.errors import NO, OK, CommandError, UsageError
from gptoss.cli.remote.options import command_parser
from gptoss.config.errors import ConfigError
from gptoss.config.schema import KEYS, ServerConfig
from gptoss.config.sources import add_flags, load_flags
from gptoss.config.text import without_secrets
from gptoss.engine.client.errors import EngineError
from gptoss.engine.client.pool import AnyEngine
from gptoss.harmony.vocabulary_files import VocabularyError

MAX_SHOWN = 20  # problems of the input file
NO_LIMIT = 2**40


def main(argv: list[str] | None = None) -> int:
    args = options_parser().parse_args(argv)
    if args.log_level is None:
        args.log_level = "warning"
    try:
        config, _, _ = load_flags({name: getattr(args, name) for name in (*KEYS, "config")})
        checked = check_input(args.input, config)
        errors = args.errors or args.output
        check_output(args.input, {args.output, errors})
        logging_setup.configure(config.log_level, config.log_format)
        with contextlib.ExitStack() as stack:
            for path in dict.fromkeys((args.output, errors)):
                stack.enter_context(locked(path))
            start = startup.prepare_model(config)
            job = BatchJob(
                args.input,
                args.output,
                errors,
                endpoint=None,
                max_line_bytes=config.max_body_bytes,
            )
            seconds = asyncio.run(run(job, checked, start, quiet=args.quiet))
    except (CacheError, ConfigError, VocabularyError) as error:
        raise UsageError(without_secrets(str(error))) from None
    report(job, seconds, as_json=args.json)
    return NO if job.counts.failed else OK


def options_parser() -> argparse.ArgumentParser:
    """Returns the parser of this command's options, which include those of `gptoss serve`."""
    parser = command_parser(__doc__ or "", epilog="")
    parser.usage = "%(prog)s run INPUT OUTPUT [--errors FILE] [--quiet] [--json] [options of gptoss serve]"
    parser.add_argument("action", choices=("run",), help="answer the requests of a file")
    parser.add_argument("input", type=Path, help="file with one request a line")
    parser.add_argument("output", type=Path, help="file that gets one answer a line; one that exists is continued")
    parser.add_argument(
        "--errors", type=Path, metavar="FILE", help="file for answers that are errors (default: OUTPUT)"
    )
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object")
    add_flags(parser)
    return parser


def check_input(path: Path, config: ServerConfig) -> Checked:
    """Returns what is known of the input file.

    Raises UsageError, which lists the lines that are not requests.
    """
    try:
        checked = check_file(path, None, URLS, config.max_body_bytes)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    if not checked.errors:
        return checked
    shown = [f"{path}: {problem}" for problem in checked.errors[:MAX_SHOWN]]
    if len(checked.errors) > MAX_SHOWN:
        shown.append(f"and {len(checked.errors) - MAX_SHOWN} more")
    raise UsageError("\n       ".join(shown))


def check_output(source: Path, outputs: set[Path]) -> None:
    """Raises UsageError if an output would overwrite the input, or cannot be written."""
    for path in outputs:
        if path.exists() and path.samefile(source):
            raise UsageError(f"{path} is the input file")
        if not path.absolute().parent.is_dir():
            raise UsageError(f"cannot write {path}: the folder does not exist")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Creates the file if necessary, and keeps other runs from writing to it. Raises UsageError."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UsageError(f"another run is writing {path}") from None
    finally:
        os.close(descriptor)


async def run(job: BatchJob, checked: Checked, start: startup.ModelStartup, *, quiet: bool) -> float:
    """Answers the requests that have no answer yet; returns the seconds it took. Raises CommandError."""
    await asyncio.to_thread(job.recover, checked.num_lines)
    if job.num_written >= checked.num_lines:
        job.close()
        return 0.0
    unlimited = [
        dataclasses.replace(one, max_num_waiting=NO_LIMIT, max_num_waiting_tokens=NO_LIMIT)
        for one in start.engine_configs
    ]
    engine = launcher.create_engine(dataclasses.replace(start, engine_configs=unlimited))
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    await engine.start()
    try:
        await engine.wait_ready()
        started = time.monotonic()
        await answer_all(job, engine, start, quiet=quiet)
        return time.monotonic() - started
    except EngineError as error:
        raise CommandError(str(error)) from None
    finally:
        job.close()
        await engine.stop()


async def answer_all(job: BatchJob, engine: AnyEngine, start: startup.ModelStartup, *, quiet: bool) -> None:
    """Runs the job to its end. Raises CommandError if it cannot continue."""
    shown = not quiet and sys.stderr.isatty()
    with tqdm(total=job.counts.total, initial=job.num_written, disable=not shown, file=sys.stderr) as bar:
        window = 2 * sum(one.max_num_seqs for one in start.engine_configs)
        runner = BatchRunner(
            dispatcher_of(engine, start), window, waits_for_engine=False, on_answer=lambda _: bar.update() and None
        )
        runner.start()
        try:
            runner.add(job)
            await job.ended.wait()
        finally:
            await job.stop()
            await runner.stop()
            if job.num_written < job.counts.total:
                left = job.counts.total - job.num_written
                bar.write(f"{left} requests have no answer yet; the same command continues", file=sys.stderr)
    if job.failure is not None:
        raise CommandError(str(job.failure))


def dispatcher_of(engine: AnyEngine, start: startup.ModelStartup) -> Dispatcher:
    return create_dispatcher(
        engine,
        start.config,
        start.vocabulary,
        model_id=start.model_id,
        model_size=start.located.size,
        repetition_guard=start.located.repetition_guard,
        aliases=start.aliases,
    )


def report(job: BatchJob, seconds: float, *, as_json: bool) -> None:
    """Writes how many requests were answered."""
    counts, usage = dataclasses.asdict(job.counts), job.usage
    if as_json:
        summary = {"request_counts": counts, "usage": usage.shown(), "seconds": seconds}
        sys.stdout.write(json.dumps(summary) + "\n")
        return
    sys.stdout.write(
        f"{counts['completed']} of {counts['total']} requests completed, {counts['failed']} failed; "
        f"{usage.input_tokens} tokens read, {usage.output_tokens} written, in {seconds:.1f} s\n"
    )
