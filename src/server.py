"""Entry point: `python src/server.py [flags]`, the same as `gptoss serve`.

multiprocessing makes every child import its parent's main module, so the engine's process and its ranks import this
file too: nothing is loaded before `main`.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # as a script src/ is first on sys.path, where src/kernels shadows Hugging Face's `kernels`
    sys.path[0] = str(Path(__file__).resolve().parents[1])


def main(argv: list[str] | None = None) -> int:
    import signal

    # blocked until the server handles it: by default it would end a server that is still loading
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})

    from gptoss.launcher import main as launch

    return launch(argv)


if __name__ == "__main__":
    sys.exit(main())
