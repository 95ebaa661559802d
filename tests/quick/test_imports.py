"""Who may import whom (docs/architecture.md, "Import rules"). What is not listed is forbidden."""

from __future__ import annotations

import ast
import graphlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SRC = ROOT / "src"


def rooms(prefix: str, names: str) -> str:
    return " ".join(f"{prefix}.{name}" for name in names.split())


WIRE = rooms("gptoss.engine", "messages sampling_params config block_hash")  # what crosses to the engine's process
SHAPES = rooms("gptoss.engine.model", "model_config named_sizes gguf_config lora_file draft_head draft_head_config")
REQUEST = f"gptoss.generation gptoss.prompt_builder gptoss.harmony gptoss.config gptoss.engine.client {WIRE}"
ENDPOINT = f"{rooms('gptoss.api', 'context hosted http telemetry access.api_keys access.rate_limits')} {REQUEST}"
# The longest name that fits is a module's rule. Every module may import the version from `gptoss`, and
# lru_cache.
ALLOWED = {
    "gptoss.__main__": "gptoss.cli.main",
    "gptoss.server": "gptoss.launcher",
    "gptoss.cli": "gptoss.cli gptoss.ray_serve gptoss.launcher gptoss.startup gptoss.logging_setup gptoss.model_locator gptoss.port_manager gptoss.prompt_builder gptoss.harmony "
    "gptoss.kernels gptoss.embedded gptoss.engine gptoss.config gptoss.cached_files gptoss.run_folder gptoss.resources gptoss.tools "
    "gptoss.parent_process",
    # the only command that runs requests itself
    "gptoss.cli.batch": f"gptoss.cli.remote gptoss.launcher gptoss.startup gptoss.logging_setup gptoss.cached_files gptoss.config "
    f"gptoss.engine.client gptoss.harmony.vocabulary_files {rooms('gptoss.api', 'dispatch batches.run')}",
    "gptoss.cli.convert": "gptoss.cli.conversion gptoss.cli.remote gptoss.cached_files gptoss.config.errors gptoss.engine.model "
    "gptoss.gguf_header gptoss.harmony.vocabulary_files gptoss.model_locator",
    "gptoss.cli.conversion": "gptoss.cli.conversion gptoss.cached_files gptoss.engine.model gptoss.gguf_header gptoss.harmony "
    "gptoss.kernels.lora gptoss.kernels.mxfp4",
    # a replica is a server without a port
    "gptoss.ray_serve": "gptoss.launcher gptoss.startup gptoss.logging_setup gptoss.config gptoss.engine.client.supervisor "
    "gptoss.engine.parallel.gpus",
    # runs tools with the sessions and limits of the loop, without a model
    **dict.fromkeys(
        ("gptoss.cli.mcp", "gptoss.cli.tool_server"),
        "gptoss.cli.remote gptoss.cli.tool_server gptoss.tools gptoss.config gptoss.harmony.vocabulary_files "
        f"{rooms('gptoss.generation', 'tool_types tool_sessions tool_run background')}",
    ),
    "gptoss.client": "gptoss.client",
    "gptoss.launcher": "gptoss.startup gptoss.api gptoss.config gptoss.port_manager gptoss.logging_setup gptoss.cached_files "
    "gptoss.harmony.vocabulary_files gptoss.engine.client gptoss.engine.core.host_agent",
    "gptoss.startup": "gptoss.config gptoss.model_locator gptoss.port_manager gptoss.harmony gptoss.cached_files "
    "gptoss.api.access.api_keys gptoss.api.access.hosts gptoss.api.http.descriptors gptoss.engine.client.adapters "
    "gptoss.engine.config gptoss.engine.parallel.device_placement gptoss.engine.parallel.gpus",
    "gptoss.model_locator": f"gptoss.config.errors gptoss.engine.config {SHAPES} gptoss.cached_files gptoss.gguf_header gptoss.resources "
    "gptoss.ollama_store",
    "gptoss.embedded": f"gptoss.embedded gptoss.harmony gptoss.kernels gptoss.resources {SHAPES}",
    # the API process
    "gptoss.api": f"gptoss.api {REQUEST} gptoss.engine.parallel.gpus",
    "gptoss.api.context": f"{rooms('gptoss.api', 'hosted http access telemetry')} {REQUEST}",
    # tools that the server runs, made and prepared for the endpoints
    "gptoss.api.hosted": f"gptoss.api.hosted gptoss.api.http gptoss.tools {REQUEST}",
    "gptoss.api.http": f"gptoss.api.http {rooms('gptoss.generation', 'errors request')} "
    f"{rooms('gptoss.harmony', 'bpe render special_tokens')} gptoss.config gptoss.engine.client {WIRE}",
    "gptoss.api.access": "gptoss.api.access gptoss.api.http gptoss.config",
    "gptoss.api.middleware": "gptoss.api.middleware gptoss.api.access gptoss.api.http gptoss.config",
    "gptoss.api.telemetry": f"gptoss.api.telemetry gptoss.api.access gptoss.api.http {REQUEST}",
    "gptoss.api.chat": f"gptoss.api.chat {ENDPOINT}",
    "gptoss.api.completions": f"gptoss.api.completions {ENDPOINT}",
    "gptoss.api.messages": f"gptoss.api.messages {ENDPOINT}",
    "gptoss.api.responses": f"gptoss.api.responses {ENDPOINT}",
    "gptoss.api.dispatch": f"{rooms('gptoss.api', 'chat completions messages responses')} {ENDPOINT}",
    "gptoss.api.batches": f"gptoss.api.batches gptoss.api.dispatch gptoss.api.access {ENDPOINT}",
    "gptoss.api.ops": f"gptoss.api.ops {ENDPOINT} gptoss.resources gptoss.engine.parallel.gpus",
    "gptoss.api.ops.lora": f"gptoss.engine.model.lora_file {ENDPOINT}",
    # with `messages` it takes any chat request
    "gptoss.api.ops.tokenize": f"gptoss.api.chat.adapter gptoss.api.chat.schema {ENDPOINT}",
    # its items hold a patch's operations
    "gptoss.api.responses.tools.patch": f"gptoss.api.responses {ENDPOINT} gptoss.tools.apply_patch.parser",
    "gptoss.generation": REQUEST,
    # tools that the server runs know what a tool is, and no endpoint
    "gptoss.tools": "gptoss.tools gptoss.generation.tool_types gptoss.harmony.conversation gptoss.config",
    "gptoss.prompt_builder": "gptoss.harmony",
    "gptoss.harmony": "gptoss.harmony gptoss.cached_files gptoss.resources gptoss.gguf_header",
    "gptoss.tools.apply_patch": "gptoss.tools.apply_patch",
    # the engine's process
    "gptoss.engine.config": "gptoss.config.errors gptoss.config.engine_keys "
    "gptoss.engine.model.draft_head gptoss.engine.model.draft_head_config gptoss.engine.model.model_config",
    "gptoss.engine.block_hash": "",
    "gptoss.engine.messages": "gptoss.engine.sampling_params",
    "gptoss.engine.sampling_params": "",
    "gptoss.engine.client": f"gptoss.engine.client gptoss.engine.core.process gptoss.config.errors gptoss.run_folder {WIRE} "
    "gptoss.engine.model.lora_file",
    "gptoss.engine.core": f"gptoss.engine.core gptoss.config.errors gptoss.logging_setup {WIRE} "
    "gptoss.engine.parallel.device_placement gptoss.engine.model.tensor_source",
    "gptoss.engine.core.hosts": f"gptoss.config.errors gptoss.engine.parallel.hosts {WIRE}",
    "gptoss.engine.core.host_agent": "gptoss.engine.core.hosts gptoss.engine.worker.rank "
    "gptoss.engine.parallel.device_placement gptoss.engine.parallel.hosts "
    f"gptoss.logging_setup {WIRE}",
    "gptoss.engine.core.executor": f"gptoss.engine.core.hosts gptoss.engine.parallel.communicator gptoss.engine.worker gptoss.config.errors gptoss.run_folder {WIRE}",
    "gptoss.engine.worker": f"gptoss.engine.worker gptoss.engine.model gptoss.engine.parallel gptoss.kernels "
    f"gptoss.config.errors gptoss.logging_setup gptoss.parent_process {WIRE}",
    "gptoss.engine.model": "gptoss.engine.model gptoss.engine.parallel gptoss.kernels gptoss.config.errors "
    "gptoss.gguf_header",
    "gptoss.engine.model.model_config": "gptoss.config.errors",
    "gptoss.engine.model.json_file": "",
    "gptoss.engine.model.lora_file": "gptoss.engine.model.json_file gptoss.engine.model.model_config",
    "gptoss.engine.model.draft_head": "gptoss.engine.model.draft_head_config gptoss.engine.model.json_file gptoss.engine.model.model_config",
    "gptoss.engine.model.draft_head_config": "gptoss.config.errors gptoss.engine.model.json_file gptoss.engine.model.model_config",
    "gptoss.engine.model.named_sizes": "gptoss.engine.model.model_config",
    "gptoss.engine.model.gguf_config": "gptoss.config.errors gptoss.engine.model.model_config gptoss.gguf_header",
    "gptoss.engine.parallel": f"gptoss.engine.parallel gptoss.engine.model.model_config gptoss.config.errors {WIRE}",
    "gptoss.kernels": "gptoss.kernels",
    # the compiled library is a derived file: locked, checksummed and kept where all of them are
    "gptoss.kernels.cpu.native": "gptoss.kernels gptoss.cached_files",
    # used by all
    "gptoss.gguf_header": "",
    "gptoss.ollama_store": "gptoss.config.errors",
    "gptoss.config": "gptoss.config gptoss.resources",
    "gptoss.config.engine_keys": "gptoss.config.key",
    "gptoss.config.key": "",
    "gptoss.cached_files": "gptoss.run_folder",
    "gptoss.run_folder": "",
    "gptoss.parent_process": "",
    "gptoss.logging_setup": "",
    "gptoss.port_manager": "gptoss.run_folder",
    "gptoss.lru_cache": "",
    "gptoss.resources": "",
}
TORCH = "kernels engine.worker engine.model engine.parallel.communicator engine.parallel.host_group embedded cli.make_checkpoint cli.convert "
TORCH += "cli.conversion"
WITH_TORCH = rooms("gptoss", TORCH).split()
NO_TORCH = [*SHAPES.split()]


def module_name(path: Path) -> str:
    name = ".".join(("gptoss", *path.relative_to(SRC).with_suffix("").parts))
    return name.removesuffix(".__init__")


FILES = {module_name(path): path for path in sorted(SRC.rglob("*.py")) if path.name != "__init__.py"}


def imports(path: Path) -> set[str]:
    """What a module imports, by full name; of ours the module, and `gptoss` for the version."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: imports are absolute"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else node.module for name in inner}
    return found


def below(name: str, prefixes: list[str]) -> bool:
    return any(name == p or name.startswith(p + ".") for p in prefixes)


def rule(name: str, rules: dict[str, str]) -> str | None:
    return max((key for key in rules if below(name, [key])), key=len, default=None)


@pytest.mark.parametrize("name", FILES)
def test_a_module_imports_only_what_it_may(name: str) -> None:
    found = imports(FILES[name])
    key = rule(name, ALLOWED)
    assert key is not None, f"{name} has no import rule"
    own_rule = ALLOWED[key]
    if key == "gptoss.api" and name.count(".") > 2:  # an endpoint without a row of its own
        own_rule = f"{'.'.join(name.split('.')[:3])} {ENDPOINT}"
    allowed = ["gptoss.lru_cache"] + own_rule.split()
    ours = {i for i in found if i.startswith("gptoss.")}
    wrong = [i for i in ours if not below(i, allowed)]
    assert not wrong, f"{name} may import only: {allowed}"
    foreign = {i.split(".")[0] for i in found}
    if not below(name, WITH_TORCH) or below(name, NO_TORCH):
        assert not foreign & {"torch", "triton", "transformers"}
    if not below(name, ["gptoss.api", "gptoss.launcher"]):
        assert not foreign & {"fastapi", "starlette", "uvicorn"}


def test_no_rule_is_left_over() -> None:
    assert not [key for key in ALLOWED if not any(rule(name, ALLOWED) == key for name in FILES)]


def test_the_import_graph_has_no_circle() -> None:
    """Imports inside functions and for types alone count too."""
    graph = {name: {i for i in imports(path) if i in FILES} for name, path in FILES.items()}
    order = [*graphlib.TopologicalSorter(graph).static_order()]  # raises CycleError
    assert sorted(order) == sorted(FILES)


@pytest.mark.parametrize("room", sorted({path.parent for path in FILES.values() if path.is_relative_to(SRC / "api")}))
def test_a_room_of_the_api_has_at_most_four_floors(room: Path) -> None:
    """A module stands one floor above the highest module of its own folder that it imports."""
    inside = {name: path for name, path in FILES.items() if path.parent == room}
    graph = {name: imports(path) & inside.keys() for name, path in inside.items()}
    floors: dict[str, int] = {}
    for name in graphlib.TopologicalSorter(graph).static_order():
        floors[name] = 1 + max((floors[lower] for lower in graph[name]), default=0)
    assert max(floors.values()) <= 4, floors


def test_the_engines_process_does_not_load_pydantic() -> None:
    for name, path in FILES.items():
        if below(name, ["gptoss.engine", *rooms("gptoss.config", "key engine_keys errors").split()]):
            assert not [i for i in imports(path) if below(i, ["pydantic"])], name


def test_nobody_imports_the_server_the_commands_or_the_course() -> None:
    for name, path in FILES.items():
        found = imports(path)
        assert not [i for i in found if below(i, ["gptoss.server", "training", "tests", "src"])], name
        if not below(name, ["gptoss.cli", "gptoss.__main__"]):
            assert not [i for i in found if below(i, ["gptoss.cli"])], name


def test_nothing_of_the_embedded_model_is_in_the_engine_or_the_api() -> None:
    for room in ("engine", "kernels", "api", "generation"):
        for path in (SRC / room).rglob("*.py"):
            if module_name(path) != "gptoss.engine.model.named_sizes":
                assert not re.search(r"nano(?!second)", path.read_text(), re.IGNORECASE), path


def test_only_the_inits_that_users_import_have_content() -> None:
    public = (SRC, SRC / "client")
    assert not [p for p in SRC.rglob("__init__.py") if p.parent not in public and p.read_text().strip()]


def test_the_engine_knows_no_harmony() -> None:
    guilty = [p for p in (SRC / "engine").rglob("*.py") if "harmony" in p.read_text().lower()]
    assert not guilty


def test_version_is_the_latest_released_changelog_entry() -> None:
    from gptoss import __version__

    changelog = (ROOT / "CHANGELOG.md").read_text()
    releases = (line for line in changelog.splitlines() if line.startswith("## ["))
    first = next(line for line in releases if line != "## [Unreleased]")
    assert first.startswith(f"## [{__version__}]")
