"""The files in deploy/ against a running server: what they ask for is there."""

from __future__ import annotations

import fnmatch
import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from gptoss.api.access.hosts import HostCheck
from gptoss.config.sources import load_config
from tests.support.server_process import ROOT, ServerProcess

DEPLOY = ROOT / "deploy"
SERIES = re.compile(r"\bgptoss_\w+")


def documents(path: str) -> list[Any]:
    return list(yaml.safe_load_all((DEPLOY / path).read_text()))


@pytest.fixture(scope="module")
def series(server: ServerProcess) -> set[str]:
    """Names that /metrics tells after some load, histograms' parts included."""
    body = {"model": "gpt-oss-nano", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5}
    for _ in range(2):
        assert httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).status_code == 200
    text = httpx.get(f"{server.url}/metrics").text
    names = {line.split("{")[0].split(" ")[0] for line in text.splitlines() if line and line[0] != "#"}
    return names | {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}


def test_the_dashboard_asks_for_what_there_is(series: set[str]) -> None:
    dashboard = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert len(expressions) > 25
    asked = {name for expr in expressions for name in SERIES.findall(expr)}
    assert asked - series == set()


def test_the_dashboard_is_what_its_script_writes() -> None:
    spec = importlib.util.spec_from_file_location("make_dashboard", DEPLOY / "grafana" / "make_dashboard.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert json.loads((DEPLOY / "grafana" / "dashboard.json").read_text()) == module.dashboard()


def test_the_rules_ask_for_what_there_is(series: set[str]) -> None:
    (rules,) = documents("prometheus/rules.yml")
    every = [rule for group in rules["groups"] for rule in group["rules"]]
    recorded = {rule["record"] for rule in every if "record" in rule}
    for rule in every:
        assert set(SERIES.findall(rule["expr"])) - series == set(), rule
        assert set(re.findall(r"gptoss:[\w:]+", rule["expr"])) <= recorded, rule
    assert {"severity"} == {key for rule in every if "alert" in rule for key in rule["labels"]}


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_prometheus_accepts_its_files(server: ServerProcess) -> None:
    for command in (("check", "config"), ("check", "rules")):
        file = "prometheus.yml" if command[1] == "config" else "rules.yml"
        done = subprocess.run(["promtool", *command, file], cwd=DEPLOY / "prometheus", capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    text = httpx.get(f"{server.url}/metrics").text
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True)
    assert "error" not in done.stderr.lower(), done.stderr


def test_kubernetes_probes_are_routes(server: ServerProcess) -> None:
    deployment, service, claim = documents("kubernetes/gpt-oss-server.yaml")
    assert [deployment["kind"], service["kind"], claim["kind"]] == ["Deployment", "Service", "PersistentVolumeClaim"]
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["readinessProbe"]["httpGet"]["path"] == container["startupProbe"]["httpGet"]["path"] == "/ready"
    assert container["livenessProbe"]["httpGet"]["path"] == "/health"
    for path in ("/ready", "/health"):
        assert httpx.get(server.url + path).status_code == 200
    assert pod["terminationGracePeriodSeconds"] > 30, "longer than drain_timeout_s"
    known = subprocess.run(
        [".venv/bin/python", "src/server.py", "--help"], cwd=ROOT, capture_output=True, text=True
    ).stdout
    for flag in (arg for arg in container["args"] if arg.startswith("--")):
        assert flag in known


def test_compose_and_dockerfiles_name_files_that_exist() -> None:
    (compose,) = documents("docker-compose.yml")
    assert (ROOT / compose["services"]["server"]["build"]["dockerfile"]).is_file()
    for service in compose["services"].values():
        for volume in service.get("volumes", ()):
            if volume.startswith("./"):
                assert (DEPLOY / volume.split(":")[0]).exists(), volume
    for name in ("Dockerfile.cpu", "Dockerfile.cuda"):
        for line in (DEPLOY / name).read_text().splitlines():
            if line.startswith("COPY"):
                for source in [part for part in line.split()[1:-1] if not part.startswith("--")]:
                    assert (ROOT / source).exists(), f"{name}: {source}"


def commands() -> dict[str, list[str]]:
    """The server's arguments in each deploy file."""
    unit = (DEPLOY / "gpt-oss-server.service").read_text()
    (compose,) = documents("docker-compose.yml")
    found = {
        "systemd": re.findall(r"^ExecStart=(.*)$", unit, re.MULTILINE)[0].split()[1:],
        "compose": compose["services"]["server"]["command"],
        "kubernetes": documents("kubernetes/gpt-oss-server.yaml")[0]["spec"]["template"]["spec"]["containers"][0][
            "args"
        ],
    }
    for name in ("Dockerfile.cpu", "Dockerfile.cuda"):
        found[name] = json.loads(re.findall(r"^CMD (.*)$", (DEPLOY / name).read_text(), re.MULTILINE)[0])
    return found


def test_the_network_reaches_no_server_without_a_key() -> None:
    (compose,) = documents("docker-compose.yml")
    for name, service in compose["services"].items():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), name
    files = re.findall(r"^EnvironmentFile=(.*)$", (DEPLOY / "gpt-oss-server.service").read_text(), re.MULTILINE)
    assert files and not [file for file in files if file.startswith("-")]
    for name, arguments in commands().items():
        config = load_config([*arguments, "--api-key", "some-key"])[0]
        assert config.require_api_key or name == "compose", name
    config = load_config(commands()["compose"])[0]
    assert HostCheck(config).allows(b"server:8000") and not HostCheck(config).allows(b"a.example")


def ignored(path: str) -> bool:
    """Whether .dockerignore leaves a path out of the build context; patterns as Docker reads them."""
    parts = Path(path).parts
    folders = ["/".join(parts[: count + 1]) for count in range(len(parts))]
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    for pattern in (line for line in lines if line and not line.startswith("#")):
        names = [parts[count] for count in range(len(parts))] if pattern.startswith("**/") else folders
        if any(fnmatch.fnmatchcase(name, pattern.removeprefix("**/")) for name in names):
            return True
    return False


def test_images_hold_what_the_server_needs_and_no_secret() -> None:
    needed = [ROOT / name for name in ("run_server.sh", "requirements.txt", "requirements.lock")]
    for folder in ("src", "assets", "configs", "scripts"):
        needed += [path for path in (ROOT / folder).rglob("*") if path.is_file()]
    sent = [str(path.relative_to(ROOT)) for path in needed if "__pycache__" not in path.parts]
    assert len(sent) > 100
    assert [path for path in sent if ignored(path)] == []
    for secret in (
        ".git/config",
        ".env",
        "deploy/server.env",
        "keys.yaml",
        "configs/keys.yml",
        "tls/server.key",
        "tls/server.pem",
        "api_key",
        ".env.local",
        ".venv/bin/python",
        "models/gpt-oss-20b/model.safetensors",
        "src/__pycache__/a.pyc",
    ):
        assert ignored(secret), secret


def test_the_images_user_can_write_where_volumes_are_mounted() -> None:
    (compose,) = documents("docker-compose.yml")
    mounted = [v.split(":")[1] for v in compose["services"]["server"]["volumes"]]
    pod = documents("kubernetes/gpt-oss-server.yaml")[0]["spec"]["template"]["spec"]
    for name in ("Dockerfile.cpu", "Dockerfile.cuda"):
        text = (DEPLOY / name).read_text()
        (user,) = re.findall(r"useradd .*--uid (\d+) (\w+)", text)
        assert int(user[0]) == pod["securityContext"]["runAsUser"]
        (made,) = re.findall(r"mkdir -p (.*?) && chown (\w+) (.*)", text.partition(f"USER {user[1]}")[0])
        assert made[1] == user[1]
        for folder in mounted:
            assert folder in made[2].replace(" models", " /app/models").split(), f"{name}: {folder}"
            assert folder.removeprefix("/app/") in made[0].split(), f"{name}: {folder}"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / "gpt-oss-server.service"
    text = (DEPLOY / "gpt-oss-server.service").read_text().replace("/opt/gpt-oss-server/run_server.sh", "/bin/true")
    unit.write_text(text.replace("User=gpt-oss\n", "").replace("/opt/gpt-oss-server", "/tmp"))
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True)
    assert "gpt-oss-server.service" not in done.stderr, done.stderr
