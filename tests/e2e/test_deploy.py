"""The files in deploy/ against a running server: what they ask for is there."""

from __future__ import annotations

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

from tests.server_process import ROOT, ServerProcess

DEPLOY = ROOT / "deploy"
SERIES = re.compile(r"\bgptoss_\w+")


def documents(path: str) -> list[Any]:
    return list(yaml.safe_load_all((DEPLOY / path).read_text()))


@pytest.fixture(scope="module")
def series(server: ServerProcess) -> set[str]:
    """Names that /metrics tells after some load, histograms' parts included."""
    body = {
        "model": "gpt-oss-nano",
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 5,
    }
    for _ in range(2):
        assert (
            httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).status_code
            == 200
        )
    text = httpx.get(f"{server.url}/metrics").text
    names = {
        line.split("{")[0].split(" ")[0] for line in text.splitlines() if line and line[0] != "#"
    }
    return names | {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}


def test_the_dashboard_asks_for_what_there_is(series: set[str]) -> None:
    dashboard = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert len(expressions) > 25
    asked = {name for expr in expressions for name in SERIES.findall(expr)}
    assert asked - series == set()


def test_the_dashboard_is_what_its_script_writes() -> None:
    spec = importlib.util.spec_from_file_location(
        "make_dashboard", DEPLOY / "grafana" / "make_dashboard.py"
    )
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
        done = subprocess.run(
            ["promtool", *command, file], cwd=DEPLOY / "prometheus", capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
    text = httpx.get(f"{server.url}/metrics").text
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, text=True
    )
    assert "error" not in done.stderr.lower(), done.stderr


def test_kubernetes_probes_are_routes(server: ServerProcess) -> None:
    deployment, service, claim = documents("kubernetes/gpt-oss-server.yaml")
    assert [deployment["kind"], service["kind"], claim["kind"]] == [
        "Deployment",
        "Service",
        "PersistentVolumeClaim",
    ]
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert (
        container["readinessProbe"]["httpGet"]["path"]
        == container["startupProbe"]["httpGet"]["path"]
        == "/ready"
    )
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


@pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed"
)
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / "gpt-oss-server.service"
    text = (
        (DEPLOY / "gpt-oss-server.service")
        .read_text()
        .replace("/opt/gpt-oss-server/run_server.sh", "/bin/true")
    )
    unit.write_text(text.replace("User=gpt-oss\n", "").replace("/opt/gpt-oss-server", "/tmp"))
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True)
    assert "gpt-oss-server.service" not in done.stderr, done.stderr
