"""The table of an evaluation run, next to the scores that OpenAI published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gptoss.cli.remote.errors import UsageError

# gpt-oss-120b & gpt-oss-20b Model Card, arXiv 2508.10925v1, table 3, without tools: percent at low, medium, high effort
PUBLISHED: dict[str, dict[str, tuple[float, float, float]]] = {
    "gpqa": {"20b": (56.8, 66.0, 71.5), "120b": (67.1, 73.1, 80.1)},
    "aime25": {"20b": (37.1, 72.1, 91.7), "120b": (50.4, 80.0, 92.5)},
    "healthbench": {"20b": (40.4, 41.8, 42.5), "120b": (53.0, 55.9, 57.6)},
    "healthbench_hard": {"20b": (9.0, 12.9, 10.8), "120b": (22.8, 26.9, 30.0)},
    "healthbench_consensus": {"20b": (84.9, 83.0, 82.6), "120b": (90.6, 90.8, 89.9)},
}
EFFORTS = ("low", "medium", "high")
HEADINGS = ("evaluation", "part", "run", "effort", "samples", "errors", "score", "± stderr")


def rows_of(folder: Path) -> list[dict[str, object]]:
    """Returns a row for each log below the folder, the newest of each task, and one for each of its parts.

    Scores are percent. Raises UsageError if there is no log.
    """
    from inspect_ai.log import list_eval_logs, read_eval_log

    if not folder.is_dir():
        raise UsageError(f"there is no folder {str(folder)!r}")
    newest: dict[tuple[str, ...], Any] = {}
    for info in sorted(list_eval_logs(str(folder)), key=lambda info: info.mtime or 0):
        log = read_eval_log(info, header_only=True)
        metadata = log.eval.metadata or {}
        if "task" in metadata:
            newest[(metadata["task"], metadata["label"], metadata["effort"], log.eval.model)] = log
    if not newest:
        raise UsageError(f"{str(folder)!r} has no log of an evaluation")
    return [row for key in sorted(newest) for row in _rows(newest[key])]


def _rows(log: Any) -> list[dict[str, object]]:
    metadata = log.eval.metadata
    score = log.results.scores[0] if log.results and log.results.scores else None
    metrics = {name: metric.value for name, metric in score.metrics.items()} if score else {}
    total = log.results.total_samples if log.results else 0
    done = log.results.completed_samples if log.results else 0
    head = {
        "evaluation": metadata["task"],
        "part": "",
        "run": metadata["label"],
        "model": metadata["model"],
        "effort": metadata["effort"],
        "samples": done,
        "errors": total - done,
        "complete": log.status == "success",
        "score": _percent(metrics.pop(metadata["metric"], None)),
        "stderr": _percent(metrics.pop("stderr", None)),
        "published": _published(metadata["task"], metadata["effort"]),
    }
    parts: list[dict[str, object]] = [
        head
        | {"part": name, "score": _percent(value), "stderr": None, "samples": None, "errors": None, "published": {}}
        for name, value in metrics.items()
    ]
    return [head, *parts]


def _percent(value: float | None) -> float | None:
    return None if value is None else round(100 * value, 1)


def _published(task: str, effort: str) -> dict[str, float]:
    return {size: scores[EFFORTS.index(effort)] for size, scores in PUBLISHED.get(task, {}).items()}


def markdown(rows: list[dict[str, object]]) -> str:
    """Returns the rows as a Markdown table, with OpenAI's scores in the last two columns."""
    sizes = ("20b", "120b")
    lines = [
        "| " + " | ".join((*HEADINGS, *(f"gpt-oss-{size} (OpenAI)" for size in sizes))) + " |",
        "|" + "---|" * (len(HEADINGS) + len(sizes)),
    ]
    for row in rows:
        published = row["published"]
        assert isinstance(published, dict)
        values = [row[name] for name in ("evaluation", "part", "run", "effort", "samples", "errors", "score", "stderr")]
        if not row["complete"] and not row["part"]:
            values[0] = f"{values[0]} (not complete)"
        cells = [*values, *(published.get(size) for size in sizes)]
        lines.append("| " + " | ".join("" if cell is None else str(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"
