"""A backend of matplotlib inside the sandbox: `plt.show()` displays figures as images of the cell."""

from __future__ import annotations

import builtins
from typing import Any

from matplotlib import pyplot
from matplotlib.backends.backend_agg import FigureCanvasAgg as FigureCanvas

__all__ = ["FigureCanvas", "show"]


def show(*_: Any, **__: Any) -> None:
    """Displays all open figures and closes them."""
    for number in pyplot.get_fignums():
        builtins.display(pyplot.figure(number))  # type: ignore[attr-defined]
    pyplot.close("all")
