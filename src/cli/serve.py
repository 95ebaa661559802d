"""gptoss serve [flags]: starts the server. The same as `python src/server.py`."""

from __future__ import annotations

import argparse


def main(argv: list[str] | None = None) -> int:
    import signal

    # blocked until the server handles it: by default it would end a server that is still loading
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})

    from gptoss.launcher import main as launch

    return launch(argv)


def options_parser() -> argparse.ArgumentParser:
    """Returns the parser of the server's flags."""
    from gptoss.config.sources import flag_parser

    return flag_parser()
