"""What the documents name exists: files, links, flags, keys, variables, routes, make targets, metrics, messages."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from gptoss.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
KEYS = set(yaml.safe_load((ROOT / "configs" / "server_config.yaml").read_text()))
DOCS = [ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")] + sorted(
    (ROOT / "docs").glob("*.md")
)
FENCE = re.compile(r"^(?:<!-- (\w+) -->\n)?```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SERVE = re.compile(r"(?:\./run_server\.sh|gptoss serve|python src/server\.py)\b([^#\n]*)")
ROUTE = re.compile(r"@router\.(?:get|post|delete)\(\s*\"([^\"]+)\"")
SUFFIXES = {"py", "md", "sh", "yaml", "yml", "json", "toml", "txt", "h", "cpp", "service", "png", "lock", "mjs", "gz"}
OTHERS_WORDS = {"proxy_pass", "proxy_buffering"}
OTHERS_WORDS |= {
    "api_base",
    "cache_aware",
    "extra_body",
    "num_gpu_blocks",
    "context_window",
    "model_catalog_json",
    "mcp_servers",
    "exec_command",
    "write_stdin",
    "multi_agent_v1",
}
EXAMPLE = "src/api/word_count/"  # of docs/adding-an-endpoint.md
EXAMPLE_KEY = "max_choices"  # of docs/adding-a-config-key.md
OTHER_FLAGS = {"config", "print-config", "help", "version"}
NOT_OURS = {"models/", "reports/", "original/", "site-packages/", "site-packages"}

docs = pytest.mark.parametrize("doc", DOCS, ids=lambda path: path.name)


def prose(doc: Path) -> str:
    return FENCE.sub("", doc.read_text())


def spans(doc: Path) -> list[str]:
    """The code within sentences."""
    return re.findall(r"`([^`\n]+)`", prose(doc))


def commands(doc: Path) -> str:
    """The shell blocks, and the code within sentences; continued lines joined."""
    blocks = [text for _, kind, text in FENCE.findall(doc.read_text()) if kind in ("sh", "console")]
    return "\n".join([*blocks, *spans(doc)]).replace("\\\n", " ")


@cache
def sources() -> str:
    folders = ("src", "tests", "bench", "scripts", "deploy", "training", "compat", "examples")
    files = [
        path
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".h", ".cpp", ".sh", ".yml", ".yaml", ".service")
    ]
    files += [
        ROOT / name for name in ("Makefile", "run_tests.sh", "run_server.sh", "pyproject.toml", "requirements.txt")
    ]
    return "\n".join(path.read_text() for path in files if path.name != "test_docs.py")


@cache
def words() -> set[str]:
    return set(re.findall(r"\w+", sources()))


@cache
def routes() -> set[str]:
    text = "\n".join(path.read_text() for path in (ROOT / "src" / "api").rglob("*.py"))
    return set(ROUTE.findall(text)) | {"/docs", "/redoc", "/openapi.json"}


@cache
def literals() -> str:
    """The sources with string literals that Python would join, joined."""
    text = "\n".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    return re.sub(r"\"\s*\n\s*f?\"", "", text).replace("`", "'")


@docs
def test_links_lead_somewhere(doc: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(doc)):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        path = doc.parent / name if name else doc
        assert path.exists(), target
        headings = (
            [
                re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-")
                for h in re.findall(r"^#+ (.+)$", path.read_text(), re.M)
            ]
            if anchor
            else []
        )
        assert not anchor or anchor in headings, target


@docs
def test_files_exist(doc: Path) -> None:
    for span in spans(doc):
        if not re.fullmatch(r"[\w.*{},-]+(/[\w.*{},-]+)*/?", span) or span in NOT_OURS or "{" in span or "<" in span:
            continue
        is_file = "." in span and span.rpartition(".")[2] in SUFFIXES and not span.startswith(".")
        if is_file and "/" not in span:
            assert any(ROOT.rglob(span)) or span in (
                "keys.yaml",
                "config.json",
                "generation_config.json",
                "adapter_config.json",
                "adapter.py",
            ), span
        elif is_file or (span.endswith("/") and "/" in span):
            found = [base for base in (ROOT, ROOT / "src", ROOT / "docs") if any(base.glob(span.rstrip("/")))]
            assert found or span.startswith(("models/", EXAMPLE)), span


@docs
def test_flags_of_the_server_exist(doc: Path) -> None:
    known = {name.replace("_", "-") for name in KEYS} | OTHER_FLAGS
    given = " ".join([*SERVE.findall(commands(doc)), *(span for span in spans(doc) if span.startswith("--"))])
    for flag in re.findall(r"--(?:no-)?([a-z][\w-]*)", given):
        assert flag in known or f'"--{flag}"' in sources(), flag


@docs
def test_variables_are_keys(doc: Path) -> None:
    for name in re.findall(r"\bGPTOSS_([A-Z_]+[A-Z])\b", doc.read_text()):
        assert name.lower() in KEYS | {"config", "url", EXAMPLE_KEY} or "SERVICE" in name, name


@docs
def test_make_targets_exist(doc: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"^(?:\$ )?make ([a-z-]+)", commands(doc), re.M)) <= targets


@docs
def test_routes_exist(doc: Path) -> None:
    known = {re.sub(r"\{[^}]*\}", "X", route) for route in routes()}
    chat = re.findall(r'^ +"(/[a-z]+)": \(', (ROOT / "src" / "cli" / "chat.py").read_text(), re.M)
    for method, path in re.findall(r"`(GET|POST|DELETE) (/[^`\s]*)`", doc.read_text()):
        assert re.sub(r"\{[^}]*\}", "X", path.partition("?")[0]) in known, f"{method} {path}"
    for path in re.findall(r"(?:http://127\.0\.0\.1:8000|^)(/[\w/.]+)", commands(doc), re.M):
        assert path in known or path in ("/page", "/tmp", "/mnt/data", "/dev/shm", "/v1/word_count") or path in chat, (
            path
        )


@docs
def test_names_in_code_exist(doc: Path) -> None:
    """Identifiers with an underscore, and names of classes."""
    for span in spans(doc):
        for name in re.findall(r"(?<![\w/.<$-])(?:[a-z]+(?:_[a-z0-9]+)+|[A-Z][a-z]+(?:[A-Z][a-z]+)+)(?![\w-])", span):
            assert name in words() | OTHERS_WORDS or _is_metric(name), name


def _is_metric(name: str) -> bool:
    bare = re.sub(r"_(total|bucket|sum|count)$", "", name.removeprefix("gptoss_"))
    return name.startswith("gptoss_") and re.search(rf"\b(gptoss_)?{bare}\b", sources()) is not None


def test_the_messages_are_the_servers() -> None:
    rows = re.findall(r"^\| (`[^`]+`) \|", (ROOT / "docs" / "troubleshooting.md").read_text(), re.M)
    assert len(rows) > 50
    for row in rows:
        for piece in re.split(r"…", row.strip("`")):
            piece = piece.strip(" ;,.:'()")
            assert re.sub(r"\s+", " ", piece) in literals(), row


def test_the_plans_of_the_quickstart_are_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs" / "quickstart.md").read_text()
    shown = re.findall(r"^\$ gptoss (memory-plan .+)$", text, re.MULTILINE)
    assert shown
    for command in [*shown, "memory-plan --table"]:
        assert main(command.split()) == 0
        assert capsys.readouterr().out in text, command


def test_the_readme_is_one_page() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


@docs
def test_paragraphs_are_short(doc: Path) -> None:
    for paragraph in re.split(r"\n\s*\n|\n(?=[-*|#] ?|\d+\. )", prose(doc)):
        assert len(paragraph.split()) <= 90, paragraph


def body_models() -> Iterator[type[BaseModel]]:
    """The pydantic models of request bodies."""
    files = [*(ROOT / "src" / "api").glob("*/schema.py"), ROOT / "src" / "api" / "http" / "fields.py"]
    for file in [*files, ROOT / "src" / "api" / "ops" / "tokenize.py"]:
        name = f"gptoss.api.{file.parent.name}.{file.stem}"
        for value in vars(importlib.import_module(name)).values():
            if isinstance(value, type) and issubclass(value, BaseModel) and value.__module__ == name:
                yield value


def test_the_api_page_has_every_field_and_every_route() -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    in_code = set(re.findall(r"[\w.]+", " ".join(re.findall(r"`([^`\n]+)`", text))))
    named = in_code | {part for name in in_code for part in name.split(".")}
    models = list(body_models())
    assert len(models) > 15
    for model in models:
        fields = {info.alias or name for name, info in model.model_fields.items()}
        assert fields <= named, (model, fields - named)
    for route in routes() - {"/cancel/{request_id}"}:
        assert re.search(re.escape(re.sub(r"\{[^}]*\}", "X", route)) + "[`?]", re.sub(r"\{[^}]*\}", "X", text)), route


def test_the_api_page_has_every_code() -> None:
    """Codes are the last arguments of errors: `code="..."`, or a name with an underscore after the field's."""
    text = "\n".join(
        path.read_text() for folder in ("api", "generation") for path in (ROOT / "src" / folder).rglob("*.py")
    )
    codes = set(re.findall(r'code="(\w+)"', text)) | set(
        re.findall(r', "((?:missing|invalid|unsupported|empty|array|integer|string|context)_\w+)"', text)
    )
    codes |= set(re.findall(r'^    "\w+": "(\w+)",$', text.partition("_CODES = {")[2].partition("}")[0], re.M))
    page = (ROOT / "docs" / "api.md").read_text()
    missing = {code for code in codes if f"`{code}`" not in page} - {
        "invalid_request_error",
        "string_type",
        "invalid_message",
    }
    assert len(codes) >= 20
    assert not missing


def test_contributing_finds_each_behaviour() -> None:
    rows = re.findall(r"^\| [^|]+ \| `(src/[^`]+)` \| `(\w+)` \|$", (ROOT / "CONTRIBUTING.md").read_text(), re.M)
    assert len(rows) == 10
    for file, name in rows:
        assert re.search(rf"\b(class|def) {name}\b", (ROOT / file).read_text()), (file, name)


@docs
def test_commands_and_scripts_take_the_options_shown(doc: Path) -> None:
    """Those of the server have a test of their own."""
    found = [
        (ROOT / "src" / "cli" / f"{name.replace('-', '_')}.py", rest)
        for name, rest in re.findall(r"^(?:\$ )?gptoss ([a-z][a-z-]+)(.*)", commands(doc), re.M)
    ]
    found += [
        (ROOT / name, rest) for name, rest in re.findall(r"^(?:\$ )?python (bench/[\w/]+\.py)(.*)", commands(doc), re.M)
    ]
    shared = (ROOT / "src" / "cli" / "remote" / "options.py").read_text()
    for path, rest in found:
        assert path.is_file(), path
        if path.name != "serve.py" or "bench" in path.parts:
            text = path.read_text() + (shared if "cli" in path.parts else "")
            if "add_flags(parser)" in text:  # those of the server too
                text += "".join(f'"--{name.replace("_", "-")}"' for name in KEYS)
            assert all(f'"{option}"' in text for option in re.findall(r"--[a-z][\w-]*", rest)), (path, rest)
