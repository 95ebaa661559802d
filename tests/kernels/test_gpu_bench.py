"""The GPU benchmarks run to their end: on a GPU machine minutes are dear. Here they run on tiny models, and time
nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import httpx
import pytest
from packaging.requirements import Requirement

from bench.gpu import kernels, model, rehearse, roofline, steps, tune
from bench.gpu.timing import Row
from gptoss.config.sources import load_config
from gptoss.kernels.triton import configs
from gptoss.kernels.triton.configs import TileConfig
from tests.kernels.gpu_helpers import DEVICE

ROOT = Path(__file__).resolve().parents[2]
MACHINE = {"python_version": "3.12", "python_full_version": "3.12.1", "sys_platform": "linux", "extra": ""}

pytestmark = [
    pytest.mark.skipif(DEVICE.type == "cuda", reason="bench/gpu/run.sh runs the benchmarks themselves"),
    pytest.mark.filterwarnings("ignore:overflow encountered"),
    pytest.mark.filterwarnings("ignore:invalid value encountered"),
]
CEILINGS = rehearse.CEILINGS
STEP_NAMES = re.search(r"names = \((.*)\)", (ROOT / "bench/gpu/steps.py").read_text())[1]  # type: ignore[index]


@pytest.fixture(autouse=True)
def on_a_cpu() -> Iterator[None]:
    with rehearse.on_a_cpu():
        yield


@pytest.mark.parametrize("tokens", [2, pytest.param(66, marks=pytest.mark.nightly)])
def test_kernel_rows(tokens: int) -> None:
    rows = [bench.row("kernels") for bench in kernels.Layer("20b").benches(tokens, context=80)]
    names = " ".join(row.name for row in rows)
    for kernel in ("qkv", "out", "router", "lm_head", "moe_w1", "moe_w2", "attention full", "attention sliding"):
        assert f"20b {kernel}" in names
    for row in rows:
        assert row.as_dict(CEILINGS)["us"] == 1.0


@pytest.mark.nightly
def test_the_steps_of_a_run_leave_their_rows(tmp_path: Path) -> None:
    for step in ("smoke", "decode"):
        assert steps.run(step, "20b", tmp_path, []) == 0
    assert steps.table(tmp_path) == 0
    found = json.loads((tmp_path / "results.json").read_text())["rows"]
    notes = {row["name"]: row["note"] for row in found}
    assert "1 replays alike: True" in notes["graph of batch 2"]
    assert notes["tokens as by torch"] == "32 of 32"
    assert "tok/s" in notes["20b decode step, batch 2, context 20"]
    assert {row["step"] for row in found} == {"smoke", "decode"}


def test_a_step_that_fails_leaves_what_it_had_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: str) -> Iterator[Row]:
        yield Row("decode", "one", 10.0)
        raise RuntimeError("no more")

    monkeypatch.setattr(steps, "decode", broken)
    assert steps.run("decode", "20b", tmp_path, []) == 1
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["note"] for row in rows] == ["", "FAILED RuntimeError: no more"]
    assert steps.table(tmp_path) == 1


def test_the_limits_of_all_steps_fit_the_time_of_a_run() -> None:
    script = (ROOT / "bench/gpu/run.sh").read_text()
    limits = {name: int(seconds) for name, seconds in re.findall(r"^step (\S+) (\d+) ", script, re.M)}
    assert len(limits) == 11
    assert sum(limits.values()) + 10 <= int(re.search(r"SECONDS_FOR_ALL:-(\d+)", script)[1]) == 540  # type: ignore[index]
    assert list(limits) == re.search(r"^known=\((.*)\)", script, re.M)[1].split()  # type: ignore[index]
    before = [seconds for name, seconds in limits.items()][: list(limits).index("decode-20b")]
    assert sum(before) <= 90, "the first decode figures come within two minutes"
    assert set(re.findall(r"'steps (\w+)", script)) <= set(re.findall(r'"(\w+)"', STEP_NAMES))


def test_the_servers_flags_are_flags_of_the_server() -> None:
    config = load_config([*steps.SERVER_FLAGS, "--model", "20b", "--port", "8000"])[0]
    assert (config.resolved("load_format"), config.resolved("max_num_seqs")) == ("dummy", 256)


def test_a_client_that_takes_too_long_is_a_row_and_not_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "LOAD_S", 0.01)
    row = steps._load("http://127.0.0.1:9", "20b", 4, tmp_path)
    assert row.note.startswith("FAILED not done in 0.01 s")


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A launch table of its own, and times that say: the more stages, the better."""
    path = tmp_path / "table.json"
    path.write_text(configs.TABLE.read_text())
    monkeypatch.setattr(configs, "TABLE", path)
    monkeypatch.setattr(tune, "CANDIDATES", {k: g | {"stages": (1, 2, 3)} for k, g in tune.CANDIDATES.items()})
    tried: list[TileConfig] = []

    def launch(config: TileConfig) -> None:
        if config.stages == 3:
            raise RuntimeError("out of shared memory")
        tried.append(config)

    def time_us(run: Callable[[], object], repeat_ms: int = 0) -> float:
        run()
        return 10.0 - tried[-1].stages

    def benches(self: object, tokens: int, context: int = 0) -> Iterator[kernels.Bench]:
        for name in tune.CANDIDATES:
            yield kernels.Bench(name, name, tokens, launch, 1)

    monkeypatch.setattr(tune, "time_us", time_us)
    monkeypatch.setattr(kernels.Layer, "__init__", lambda self, model: None)
    monkeypatch.setattr(kernels.Layer, "benches", benches)
    configs.load_table.cache_clear()
    yield path
    monkeypatch.undo()
    configs.load_table.cache_clear()


def rows_in(path: Path, kernel: str) -> list[dict[str, int]]:
    return list(json.loads(path.read_text())["interpreter"][kernel])


def test_tuning_keeps_what_is_faster_row_by_row(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = json.loads(table.read_text())
    assert tune.main(["--kernels", "qkv", "moe_w2", "--tokens", "1", "32"]) == 0
    assert json.loads(table.read_text()) == before, "without --write it only prints"
    best = tune.best

    def ended(benches: list[kernels.Bench], candidates: list[TileConfig]) -> tuple[TileConfig, float] | None:
        if benches[0].kernel == "router":
            raise KeyboardInterrupt
        return best(benches, candidates)

    monkeypatch.setattr(tune, "best", ended)
    with pytest.raises(KeyboardInterrupt):
        tune.main(["--kernels", "qkv", "moe_w2", "router", "--tokens", "1", "--write"])
    assert [row["stages"] for row in rows_in(table, "qkv")] == [2]
    assert [(row["stages"], row["block_m"]) for row in rows_in(table, "moe_w2")] == [(2, 8), (1, 16)]
    assert rows_in(table, "router") == before["interpreter"]["router"]
    assert json.loads(table.read_text())["sm_90"] == before["sm_90"]


def test_a_row_that_no_candidate_can_run_stays(
    table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tune, "CANDIDATES", {k: g | {"stages": (3,)} for k, g in tune.CANDIDATES.items()})
    before = rows_in(table, "out")
    assert tune.main(["--kernels", "out", "qkv", "--tokens", "32", "--write"]) == 0
    assert rows_in(table, "out") == before
    said = capsys.readouterr()
    assert "out, 32 tokens: no candidate runs" in said.out and "qkv, 32 tokens: no candidate runs" in said.out
    assert "out of shared memory" in said.err


def test_candidates_of_the_experts_walk_the_tiles_of_the_table() -> None:
    table = {k: list(rows) for k, rows in configs.load_table()["sm_90"].items()}
    for row in tune.rows(table, ["moe_w1", "moe_w2"], [1, 32]):
        found = row.candidates()
        assert found[0] == row.old and len(set(found)) == len(found) > 5
        assert {c.block_m for c in found} == {row.old.block_m}
        assert (max(c.split for c in found) > 1) is (row.kernel == "moe_w2" and row.tokens == 1)


def test_launch_rows() -> None:
    assert [row.section for row in model.launches()] == ["launch"]


def test_what_a_row_says() -> None:
    row = Row("kernels", "one", 10.0, moved_bytes=20_000_000, flops=3_500_000_000).as_dict(CEILINGS)
    assert (row["tb_s"], row["of_copy"], row["tflop_s"], row["of_matmul"]) == (2.0, 0.5, 350.0, 0.5)


def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert steps.main(["smoke", "--out", str(tmp_path)]) == 3
    assert "no NVIDIA GPU" in capsys.readouterr().err


@pytest.mark.nightly
def test_the_benchmarks_own_flags_start_a_server(tmp_path: Path) -> None:
    flags = [flag for flag in steps.SERVER_FLAGS if flag not in ("--load-format", "dummy")]
    with steps.server("nano", tmp_path, flags) as (url, _):
        assert httpx.get(f"{url}/ready").status_code == 200
        assert "0 kernels compiled while serving" in steps._prompts(url, "nano", 3, tmp_path).note


def test_wheels_bring_all_that_they_need_beside_the_machine() -> None:
    """Every requirement of the packages that wheels.sh fetches is fetched too, or part of the machine."""
    script = (ROOT / "bench/gpu/wheels.sh").read_text()
    fetched, there = (
        {_normal(name) for name in re.search(rf"^{what}=\(\n(.*?)^\)", script, re.M | re.S)[1].split()}  # type: ignore[index]
        for what in ("packages", "machine")
    )
    assert "fastapi" in fetched and "torch" in there
    missing = set()
    for name in fetched:
        for line in metadata.requires(name) or ():
            needed = Requirement(line)
            applies = needed.marker is None or needed.marker.evaluate(MACHINE)
            if applies and _normal(needed.name) not in fetched | there:
                missing.add((name, needed.name))
    assert missing == set()


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_roofline_of_the_kernels_as_they_were() -> None:
    """By hand: 24 layers of 60 us, of which 6 are gaps, the head at 96 % of the memory's rate, and 45 us outside."""
    megabytes = (29.5, 2.1, 0.3, 23.6, 0.2, 35.3, 17.6)
    works = [
        roofline.Work(name, ctas, warps, count, size, trips, calls=0.5 if "attention" in name else 1.0)
        for (name, (ctas, warps, count, trips)), size in zip(roofline.BEFORE["20b"].items(), megabytes, strict=True)
    ]
    card = roofline.CARDS["H200"]
    found = {t.work.kernel: t for t in roofline.times(works, card)}
    assert found["qkv"].us == pytest.approx(29.5 / 4.3 / 0.78)
    assert found["router"].us == pytest.approx(12_064 / 1.98 / 0.6 / 1e3)
    assert found["moe_w1"].us == pytest.approx(2 * 9804 / 1.98 / 0.8 / 1e3)
    assert found["moe_w2"].us == pytest.approx(9980 / 1.98 / 0.6 / 1e3 + 2 * 0.6)
    head = roofline.times([roofline.Work("lm_head", 3142, 4, 4634, 1158.3)], card)[0]
    layer, step = roofline.step_us(list(found.values()), head, 24)
    assert layer == pytest.approx(60, abs=0.5)
    assert 1e6 / step == pytest.approx(560, rel=0.01)


def test_weights_that_are_asked_for_early_come_while_the_memory_is_idle() -> None:
    card = roofline.CARDS["H200"]
    busy = roofline.Work("one", 528, 1, 100, 40.0)
    idle = roofline.Work("one", 528, 1, 100, 0.0, trips=8)
    late, early = (roofline.Work("two", 160, 1, 100, 20.0, early_bytes=n) for n in (0, 125_000))
    after = [[roofline.times([one, two], card)[1].us for two in (late, early)] for one in (busy, idle)]
    assert after[0][0] == after[0][1] == after[1][0] == pytest.approx(20 / 4.3 / 0.78)
    assert 20 / 5.5 <= after[1][1] < after[1][0]
