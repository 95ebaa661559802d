"""Evaluations: files, checks of answers, the table. What needs inspect-ai is in compat/test_eval.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gptoss.cli.evals.data import find, read, some
from gptoss.cli.evals.ifeval_rules import CHECKS, follows
from gptoss.cli.evals.report import markdown
from gptoss.cli.main import main
from gptoss.cli.remote.errors import UsageError

FOLLOWED: list[tuple[str, dict[str, Any], str, str]] = [
    ("keywords:existence", {"keywords": ["tea", "milk"]}, "Tea with Milk", "Tea"),
    ("keywords:frequency", {"keyword": "tea", "frequency": 2, "relation": "at least"}, "tea, Tea", "tea"),
    ("keywords:frequency", {"keyword": "tea", "frequency": 2, "relation": "less than"}, "tea", "tea tea"),
    ("keywords:forbidden_words", {"forbidden_words": ["tea"]}, "a team", "a tea."),
    ("keywords:letter_frequency", {"letter": "q", "let_frequency": 2, "let_relation": "at least"}, "Qq", "q"),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "at least"}, "One. Two", "Mr. One."),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\nb", "a\n\nb"),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, "one two", "one two three"),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "then"},
        "First.\n\n'Then, it",
        "First.\n\nAnd then",
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name] [town]", "[name]"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "text\nP. S. more", "text"),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "P.P.S more", "P.S. more"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n- b", "* a\n**b**"),
    ("detectable_format:constrained_response", {}, "My answer is no.", "No."),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* and **b c**", "*a* and ** **"),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Section", "num_sections": 2},
        "Section 1 a Section 2 b",
        "Section one",
    ),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "{a: 1}"),
    ("detectable_format:title", {}, "<<A day>>\ntext", "<< >>\ntext"),
    ("combination:two_responses", {}, "one******two", "one******one"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it."}, "say it. It.", "It."),
    ("startend:end_checker", {"end_phrase": "The end."}, 'It was "the end."', "The end. Or"),
    ("startend:quotation", {}, '"text"', '"text'),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 1, "capital_relation": "less than"},
        "no Capitals",
        "SOME",
    ),
    ("punctuation:no_comma", {}, "one two", "one, two"),
]
LANGUAGE = {"language:response_language", "change_case:english_capital", "change_case:english_lowercase"}


@pytest.mark.parametrize("name, arguments, good, bad", FOLLOWED, ids=[row[0] for row in FOLLOWED])
def test_instructions(name: str, arguments: dict[str, Any], good: str, bad: str) -> None:
    unused = {"language": None}  # the published file has null for the arguments of other instructions
    assert follows(name, good, arguments | unused)
    assert not follows(name, bad, arguments) and not follows(name, " ", arguments)


def test_all_instructions_but_those_of_language_are_tested_here() -> None:
    assert set(CHECKS) - {row[0] for row in FOLLOWED} == LANGUAGE and len(CHECKS) == 25


def test_files(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.jsonl").write_text('{"q": 1}\n\n{"q": 2}\n')
    (tmp_path / "a.json").write_text('[{"q": 3}]')
    (tmp_path / "a.csv").write_text('q,r\n"x, y",2\n')
    (path,) = find(tmp_path, ("b*.jsonl", "a.jsonl"), "A")
    assert read(path, ("q",)) == [{"q": 1}, {"q": 2}]
    assert read(tmp_path / "a.json", ()) == [{"q": 3}]
    assert read(tmp_path / "a.csv", ("r",)) == [{"q": "x, y", "r": "2"}]
    assert some(list(range(9)), 3, seed=1) == some(list(range(9)), 3, seed=1) == sorted(some(list(range(9)), 3, 1))
    assert some([1, 2], None, 0) == some([1, 2], 5, 0) == [1, 2]


@pytest.mark.parametrize(
    "text, problem",
    [
        ('{"q": 1}\n{"r": 1}', "a.jsonl, record 2: no field 'q'"),
        ('{"q": 1}\n{"q": ', "a.jsonl, line 2, is not JSON"),
        ("[1", "is not JSON"),
        ("", "is empty"),
        ("3", "record 1: no field 'q'"),
    ],
)
def test_wrong_files(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(UsageError, match=problem):
        read(tmp_path / "a.jsonl", ("q",))


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no file of A: a\.csv or b\.csv"):
        find(tmp_path, ("a.csv", "b.csv"), "A")
    with pytest.raises(UsageError, match="there is no folder"):
        find(tmp_path / "none", ("a.csv",), "A")


def test_the_table() -> None:
    row: dict[str, object] = {
        "evaluation": "gpqa",
        "part": "",
        "run": "",
        "effort": "low",
        "samples": 6,
        "errors": 1,
        "complete": False,
        "score": 50.0,
        "stderr": 2.1,
        "published": {"20b": 56.8, "120b": 67.1},
    }
    part = row | {"part": "math", "samples": None, "errors": None, "stderr": None, "published": {}}
    lines = markdown([row, part]).splitlines()
    assert lines[2] == "| gpqa (not complete) |  |  | low | 6 | 1 | 50.0 | 2.1 | 56.8 | 67.1 |"
    assert lines[3] == "| gpqa | math |  | low |  |  | 50.0 |  |  |  |"
    assert {line.count("|") for line in lines} == {11}


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("gptoss.cli.eval.find_spec", lambda name: None if name == "inspect_ai" else object())
    assert main(["eval", "gpqa", "--data", "x"]) == 2
    assert "evaluations need inspect_ai: pip install 'gpt-oss-server[eval]'" in capsys.readouterr().err
    for arguments, problem in ((["nix"], "no evaluation 'nix': gpqa, "), ([], "name an evaluation")):
        with pytest.raises(SystemExit, match="2"):
            main(["eval", *arguments])
        assert problem in capsys.readouterr().err
