"""The suite and its long form: `./run_tests.sh` and `make nightly`."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TypeVar

import pytest

VARIABLE = "TEST_NIGHTLY"  # set by --nightly before tests are collected
T = TypeVar("T")


def is_nightly() -> bool:
    return os.environ.get(VARIABLE) == "1"


def sized(suite: T, nightly: T) -> T:
    """A size for the suite, or the one of the nightly run."""
    return nightly if is_nightly() else suite


def nightly_except(*in_suite: object, of: Iterable[object]) -> list[object]:
    """All values of a parameter; only those `in_suite` run in the suite."""
    return [value if value in in_suite else pytest.param(value, marks=pytest.mark.nightly) for value in of]
