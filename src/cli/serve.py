"""gptoss serve [flags]: starts the server. The same as `python src/server.py`.

gptoss serve --ray [--replicas 2:4] [flags]: starts it on Ray Serve (docs/ray.md).
"""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec

from gptoss.cli.remote.errors import UsageError

RAY = "--ray"


def main(argv: list[str] | None = None) -> int:
    import signal

    # blocked until the server handles it: by default it would end a server that is still loading
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})

    given = sys.argv[1:] if argv is None else argv
    if RAY in given:
        if find_spec("ray") is None:
            raise UsageError(
                "--ray needs Ray: pip install 'gpt-oss-server[ray]', or -r requirements-ray.txt in a checkout"
            )
        from gptoss.ray_serve import main as launch_on_ray

        return launch_on_ray([flag for flag in given if flag != RAY])
    from gptoss.launcher import main as launch

    return launch(argv)


def options_parser() -> argparse.ArgumentParser:
    """Returns the parser of the server's flags."""
    from gptoss.config.sources import flag_parser

    return flag_parser()
