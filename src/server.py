"""Entry point: `python src/server.py [flags]`. Wires the parts together and decides nothing.

The engine's process and its ranks import this file too, as multiprocessing has every child import its parent's main
module: nothing is loaded before `main`.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a script: src/ is first on sys.path, and src/kernels would shadow HuggingFace `kernels`
    sys.path[0] = str(Path(__file__).resolve().parents[1])


def main(argv: list[str] | None = None) -> int:
    import logging
    import os
    import signal

    # held back until the server handles it; by default it would end a server that is still loading
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})

    import uvloop

    from gptoss import __version__, logs, port_manager
    from gptoss.cached_files import CacheError, default_cache_folder
    from gptoss.config import describe, load_config, service_variables
    from gptoss.config_text import without_secrets
    from gptoss.engine.config import ConfigError
    from gptoss.harmony.vocabulary import VocabularyError, load_vocabulary
    from gptoss.model_locator import locate_model
    from gptoss.serving import check_access, choose_model, engine_config, serve

    logger = logging.getLogger("server")
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # CUDA's numbers are then the driver's
    try:
        config, origin, print_config = load_config(argv)
        if print_config:
            sys.stdout.write(describe(config, origin))
            return 0
        logs.configure(config.log_level, config.log_format)
        logger.info("gpt-oss server %s", __version__)
        if ignored := service_variables():
            logger.info("ignoring Kubernetes service variables: %s", ", ".join(ignored))
        callers = check_access(config, origin)
        bound = port_manager.reserve(config.host, config.port, auto=config.auto_port, force=config.force_port)
        cache = default_cache_folder()
        located = locate_model(choose_model(config), config.model_path, cache, dummy=config.load_format == "dummy")
        vocabulary = load_vocabulary(located.folder, cache)
        engine_settings = engine_config(config, located, vocabulary)
    except (CacheError, ConfigError, VocabularyError, port_manager.PortError) as error:
        sys.stderr.write(f"error: {without_secrets(str(error))}\n")
        return 2
    with port_manager.recorded(bound):
        return uvloop.run(serve(config, engine_settings, bound, located, vocabulary, callers))


if __name__ == "__main__":
    sys.exit(main())
