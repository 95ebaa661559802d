"""The figures of `gptoss bench` as a picture: a panel a figure, over the streams or the rate.

Needs matplotlib.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from gptoss.cli.remote.connection import reason
from gptoss.cli.remote.errors import UsageError

AT = re.compile(r"(?P<figure>.+) at (?P<load>[\d.]+)(?P<rate>/s)?")
SPREAD = re.compile(r"(.+) (p50|p95) (.+)")  # of one panel
COLUMNS, WIDTH, HEIGHT = 2, 5.0, 3.2  # inches a panel


def check_plot(path: Path) -> None:
    """Raises UsageError if no picture can be written there."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UsageError("--plot needs matplotlib: pip install 'gpt-oss-server[plot]'") from None
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise UsageError(f"--plot takes the name of a .png, .svg or .pdf file, not {str(path)!r}")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"--plot: there is no folder {str(path.absolute().parent)!r}")


def panels(results: Sequence[dict[str, float]]) -> dict[str, dict[tuple[int, str], list[tuple[float, float]]]]:
    """Returns the points of each panel by target and line: figures that are measured at several loads."""
    found: dict[str, dict[tuple[int, str], list[tuple[float, float]]]] = {}
    for target, figures in enumerate(results):
        for name, value in figures.items():
            if (at := AT.fullmatch(name)) is None:
                continue
            spread = SPREAD.fullmatch(at["figure"])
            title, line = (f"{spread[1]} {spread[3]}", spread[2]) if spread else (at["figure"], "")
            found.setdefault(title, {}).setdefault((target, line), []).append((float(at["load"]), value))
    return found


def write_plot(path: Path, names: Sequence[str], results: Sequence[dict[str, float]]) -> None:
    """Writes the picture. Raises UsageError if it cannot be written.

    `names`: of the targets, for the legend.
    """
    from matplotlib.figure import Figure

    found = panels(results)
    rows = -(-len(found) // COLUMNS)
    figure = Figure(figsize=(COLUMNS * WIDTH, rows * HEIGHT), layout="constrained")
    by_rate = any(name.endswith("/s") and " at " in name for name in results[0])
    for place, (title, lines) in enumerate(found.items(), 1):
        axes = figure.add_subplot(rows, COLUMNS, place)
        for (target, line), points in lines.items():
            loads, values = zip(*sorted(points), strict=True)
            label = f"{names[target]} {line}".strip()
            axes.plot(loads, values, marker="o", color=f"C{target}", ls="--" if line == "p95" else "-", label=label)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("requests a second" if by_rate else "streams", fontsize=8)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {reason(error)}") from None
