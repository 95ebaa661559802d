"""Entry point: `python src/server.py [flags]`, the same as `gptoss serve`.

The engine's process and its ranks import this file too, as multiprocessing has every child import its parent's main
module: nothing is loaded before `main`.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a script: src/ is first on sys.path, and src/kernels would shadow HuggingFace `kernels`
    sys.path[0] = str(Path(__file__).resolve().parents[1])


def main(argv: list[str] | None = None) -> int:
    import signal

    # held back until the server handles it; by default it would end a server that is still loading
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})

    from gptoss.launcher import main as launch

    return launch(argv)


if __name__ == "__main__":
    sys.exit(main())
