"""What a server needs before its engine starts: access, port, model, the engine's configuration."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import logging
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptoss import port_manager
from gptoss.api.access.api_keys import Caller, load_callers
from gptoss.api.access.hosts import is_loopback
from gptoss.api.http.descriptors import allowed_connections
from gptoss.cached_files import default_cache_folder
from gptoss.config.engine_keys import DeviceKeys, EngineKeys, LoraKeys
from gptoss.config.errors import ConfigError
from gptoss.config.schema import ServerConfig
from gptoss.engine.client.adapters import Adapters
from gptoss.engine.config import EngineConfig
from gptoss.engine.parallel.device_placement import place_engines
from gptoss.engine.parallel.gpus import visible_gpus
from gptoss.harmony.special_tokens import PROBE_TOKEN_IDS, SPECIAL_TOKENS, SPLIT_PATTERN, STOP_TOKEN_IDS
from gptoss.harmony.vocabulary import find_ranks
from gptoss.harmony.vocabulary_files import Vocabulary, load_vocabulary
from gptoss.model_locator import LocatedModel, is_embedded, locate_model

if TYPE_CHECKING:
    pass

logger = logging.getLogger("server")


@dataclass(frozen=True, slots=True)
class ModelStartup:
    """What an engine needs to start, with or without a server."""

    config: ServerConfig
    engine_configs: list[EngineConfig]  # of each engine
    model: str  # a size, a folder or a Hub id
    located: LocatedModel
    vocabulary: Vocabulary
    adapters: Adapters

    @property
    def model_id(self) -> str:
        """The name in /v1/models."""
        return model_id(self.config, self.located)

    @property
    def aliases(self) -> frozenset[str]:
        """Other names that requests may use."""
        return model_aliases(self.located)

    def renewed_engine_config(self, number: int) -> EngineConfig:
        """Returns the configuration for an engine that is started again, with intact cached files."""
        folder, cache = self.located.folder, default_cache_folder()
        if is_embedded(self.model, self.config.model_path) and folder is not None:
            folder = locate_model(self.model, None, cache).folder
        ranks_path = find_ranks(folder, cache) or self.vocabulary.ranks_path
        return dataclasses.replace(self.engine_configs[number], model_path=folder, ranks_path=ranks_path)


@dataclass(frozen=True, slots=True)
class Startup(ModelStartup):
    """What is known before the server's engine starts."""

    callers: list[Caller]
    bound: socket.socket
    max_connections: int


def prepare(config: ServerConfig, origin: Mapping[str, str]) -> Startup:
    """Returns all that a server needs to start its engine, with the port reserved.

    Raises:
        ConfigError, CacheError, VocabularyError, PortError: the server cannot start.
    """
    check_backend(config)
    check_batches(config)
    callers = check_access(config, origin)
    max_connections = allowed_connections(config.max_connections)
    bound = port_manager.reserve(config.host, config.port, auto=config.auto_port, force=config.force_port)
    model = prepare_model(config)
    known = {field.name: getattr(model, field.name) for field in dataclasses.fields(ModelStartup)}
    return Startup(**known, callers=callers, bound=bound, max_connections=max_connections)


def prepare_model(config: ServerConfig) -> ModelStartup:
    """Returns what an engine needs to start. Raises ConfigError, CacheError or VocabularyError."""
    cache, model = default_cache_folder(), choose_model(config)
    located = locate_model(model, config.model_path, cache, dummy=config.load_format == "dummy")
    vocabulary = load_vocabulary(located.folder, cache)
    settings = engine_config(config, located, vocabulary)
    names = {model_id(config, located), *model_aliases(located), *config.all_profiles()}
    adapters = Adapters.of_config(settings, lambda: names)
    settings = dataclasses.replace(settings, max_lora_bytes=adapters.max_bytes or None)
    return ModelStartup(config, place_engines(settings), model, located, vocabulary, adapters)


def model_id(config: ServerConfig, located: LocatedModel) -> str:
    """Returns the model's name in /v1/models."""
    return config.served_model_name or located.name


def model_aliases(located: LocatedModel) -> frozenset[str]:
    """Returns the other names by which requests may ask for the model."""
    size = located.size
    names = {size, f"gpt-oss-{size}", f"openai/gpt-oss-{size}", f"gpt-oss:{size}"}
    return frozenset(names) if size != "custom" else frozenset()


def check_backend(config: ServerConfig) -> None:
    """Raises ConfigError if a package that the backend needs is not installed."""
    packages = ("transformers", "accelerate") if config.backend == "transformers" else ()
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"backend 'transformers' requires {' and '.join(missing)}; install the package's extra 'transformers', or "
            f"run: pip install {' '.join(packages)}"
        )


def check_batches(config: ServerConfig) -> None:
    """Raises ConfigError if the package that reads uploads is not installed."""
    if config.batch_dir is not None and importlib.util.find_spec("python_multipart") is None:
        raise ConfigError(
            "batch_dir requires python-multipart; install the package's extra 'batches', or run: pip install "
            "python-multipart"
        )


def choose_model(config: ServerConfig) -> str:
    """Returns the configured model, else the profile's with a GPU and the embedded one without."""
    if config.model is not None:
        return config.model
    if config.model_path is not None:
        return str(config.model_path)
    if visible_gpus():
        return config.active_profile.model
    logger.info("no GPU and no --model: serving the embedded model nano on the CPU")
    return "nano"


def check_access(config: ServerConfig, origin: Mapping[str, str]) -> list[Caller]:
    """Returns the callers that have a key.

    Warns if the network or other users of this machine have access.

    Raises:
        ConfigError: a key is invalid, or require_api_key is set and there is none.
    """
    callers = load_callers(config)
    if not callers:
        if config.require_api_key:
            raise ConfigError("require_api_key is set, but there is no key: set GPTOSS_API_KEY or api_keys_file")
        if not is_loopback(config.host):
            logger.warning(
                "no API key is set and host %s is not loopback: anyone who reaches this port can use the server; "
                "set GPTOSS_API_KEY or api_keys_file (docs/security.md)",
                config.host,
            )
    if origin.get("api_key") == "flag":
        logger.warning("api_key is on the command line, which every user of this machine can read: use GPTOSS_API_KEY")
    return callers


def engine_config(config: ServerConfig, located: LocatedModel, vocabulary: Vocabulary) -> EngineConfig:
    """Returns the engine's configuration: its keys, and what profile, model and vocabulary imply."""
    keys = {
        key: config.resolved(key) for group in (DeviceKeys, EngineKeys, LoraKeys) for key in group.__dataclass_fields__
    }
    keys["weights_cache_dir"] = config.weights_cache_dir or default_cache_folder() / "weights"
    keys["max_model_len"] = config.max_model_len or located.config.max_position
    return EngineConfig(
        located.config,
        located.folder,
        ranks_path=vocabulary.ranks_path,
        special_tokens=SPECIAL_TOKENS,
        split_pattern=SPLIT_PATTERN,
        eos_token_ids=STOP_TOKEN_IDS,
        probe_token_ids=PROBE_TOKEN_IDS,
        **keys,
    )
