"""What the GPU tools refuse before they compile or measure anything."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench.gpu import anchor, roofline, steps, tune

CARD = roofline.CARDS["H200"]


def refused(main: object, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)  # type: ignore[operator]
    return capsys.readouterr().err


@pytest.mark.parametrize("value", ["0", "-1", "1025", "x"])
def test_a_batch_of_the_roofline(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(roofline.main, ["--batch", value], capsys)
    assert f"argument --batch: '{value}' is not a whole number from 1 to 1024" in said


@pytest.mark.parametrize("value", ["0", "-5", "131073"])
def test_a_context_of_the_roofline(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(roofline.main, ["--context", value], capsys)
    assert f"argument --context: '{value}' is not a whole number from 1 to 131072" in said


def test_a_file_that_the_roofline_cannot_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (tmp_path, tmp_path / "none" / "x.json"):
        assert "argument --json: " in refused(roofline.main, ["--json", str(path)], capsys)


def attention(monkeypatch: pytest.MonkeyPatch, batch: int, context: int) -> list[roofline.Work]:
    compiled = SimpleNamespace(longest=lambda tiles: 100 * tiles), SimpleNamespace(warps=2)
    monkeypatch.setattr(roofline.Step, "_compiled", lambda self, kernel, suffix="": compiled)
    return roofline.Step("20b", batch, CARD, context)._attention()


@pytest.mark.parametrize("batch", [128, 129, 256, 1024])
def test_large_batches_have_one_program_a_sequence(monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    full, sliding = attention(monkeypatch, batch, 1024)
    assert (full.ctas, sliding.ctas) == (8 * batch, 8 * batch)
    assert full.instructions == 1600


def test_a_short_context_is_not_charged_the_whole_window(monkeypatch: pytest.MonkeyPatch) -> None:
    for context, keys, tiles in ((10, 10, 1), (1024, 128, 3)):
        full, sliding = attention(monkeypatch, 1, context)
        assert sliding.megabytes == pytest.approx(keys * 2 * 8 * 64 * 2e-6)
        assert sliding.instructions == 100 * tiles


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_tools_say_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(tune.support, "interpreted", lambda: False)
    assert tune.main(["--kernels", "qkv", "--tokens", "1"]) == 3
    assert anchor.main([]) == 3
    assert capsys.readouterr().err.count("no NVIDIA GPU here") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--capability", "75"], "argument --capability: 75: the kernels need sm_80 or later"),
        (["--capability", "80", "--fp8"], "argument --fp8: needs sm_89 or later, and --capability is 80"),
        (["--max-num-seqs", "0"], "argument --max-num-seqs: '0' is not a whole number from 1 to 1024"),
        (["--workers", "0"], "argument --workers: '0' is not"),
    ],
)
def test_a_dry_run(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", "0"))  # the module removes it
    from bench.kernels import dry_run

    assert message in refused(dry_run.main, arguments, capsys)


def test_the_table_without_rows_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert steps.table(tmp_path) == 1
    assert f"| - | no step has left a row in {tmp_path} | - | - |" in capsys.readouterr().out
    assert json.loads((tmp_path / "results.json").read_text())["rows"] == []


def test_the_table_names_failed_steps_and_skips_damaged_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"section": "smoke", "name": "one", "us": 1.0, "note": "", "step": "smoke"}
    failed = row | {"name": "the step", "us": 0.0, "note": "FAILED killed by signal 9"}
    (tmp_path / "ceilings.json").write_text('{"copy')
    (tmp_path / "rows.jsonl").write_text(f'{json.dumps(row)}\n{{"sec\n[1]\n{json.dumps(failed)}\n')
    assert [steps.table(tmp_path, of) for of in ((), ["smoke"], ["http"])] == [1, 1, 0]
    said = capsys.readouterr()
    assert "| smoke | the step | - | FAILED killed by signal 9 |" in said.out
    assert "line 2 is damaged and skipped" in said.err and "line 3 is damaged" in said.err
    result = json.loads((tmp_path / "results.json").read_text())
    assert (result["failed"], result["rows"], result["ceilings"]) == (["smoke"], [row, failed], {})
