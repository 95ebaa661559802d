"""The sliding window behind /stats."""

from __future__ import annotations

from typing import Any, cast

import pytest

from gptoss.api.http.errors import InvalidRequest, Unavailable
from gptoss.api.telemetry import metrics as m
from gptoss.api.telemetry import request_record
from gptoss.api.telemetry.request_accounting import RequestAccounting
from gptoss.engine.client.errors import EngineError


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(m.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def finished(metrics: m.Metrics, clock: Clock, num_tokens: int, gap_s: float = 0.25) -> None:
    record = request_record.RequestRecord(arrival=clock.now, num_prompt_tokens=10)
    metrics.begin(record)
    for _ in range(num_tokens):
        clock.now += gap_s
        record.tokens_arrived(1)
    metrics.finish(record, ["stop"])


def test_what_is_older_than_the_window_is_forgotten_though_nobody_looks(clock: Clock) -> None:
    metrics = m.Metrics()
    for _ in range(20):
        finished(metrics, clock, 4)
        clock.now += m.WINDOW_S
    assert len(metrics._window) == 1
    assert metrics.outcomes["ok"] == 20


def test_a_long_answer_leaves_some_of_its_gaps(clock: Clock) -> None:
    metrics = m.Metrics()
    finished(metrics, clock, 5000)
    assert 16 <= len(metrics._window[0].gaps) <= m.WINDOW_GAPS
    assert metrics.window()["inter_token_s"] == {"p50": 0.25, "p95": 0.25, "p99": 0.25}
    finished(metrics, clock, 3)
    assert len(metrics._window[1].gaps) == 2


def test_the_window_holds_so_many_requests_and_its_rates_are_theirs(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(m, "WINDOW_REQUESTS", 8)
    metrics = m.Metrics()
    clock.now += 200
    for _ in range(100):
        finished(metrics, clock, 1)
    found = metrics.window()
    assert found["requests"] == 8
    assert found["output_tokens_per_s"] == pytest.approx(8 / (7 * 0.25))


def test_gaps_are_told_while_the_answer_runs(clock: Clock) -> None:
    metrics = m.Metrics()
    record = request_record.RequestRecord(arrival=clock.now)
    metrics.begin(record)
    for count in (1, 2, 4):
        clock.now += 1
        record.tokens_arrived(count)

    def observed() -> tuple[float | None, float | None]:
        name = "gptoss_inter_token_latency_seconds"
        return tuple(metrics.registry.get_sample_value(f"{name}_{what}") for what in ("count", "sum"))  # type: ignore[return-value]

    assert observed() == (2, 0.75)
    metrics.finish(record, ["stop"])
    assert observed() == (2, 0.75)


@pytest.mark.parametrize(
    ("error", "raised", "outcome"),
    [
        (InvalidRequest("no"), InvalidRequest, "rejected"),
        (EngineError("no"), Unavailable, "rejected"),
        (RuntimeError("a bug"), RuntimeError, "failed"),
        (OSError("a socket"), OSError, "failed"),
    ],
)
def test_each_request_that_ends_before_it_runs_is_counted_once(
    error: Exception, raised: type[Exception], outcome: str
) -> None:
    metrics, unused = m.Metrics(), cast(Any, None)
    accounting = RequestAccounting(request_record.RequestRecord(), unused, unused, metrics, unused, None)
    with pytest.raises(raised), accounting.counted_rejections():
        raise error
    assert metrics.outcomes == {outcome: 1}
    assert f'gptoss_requests_total{{outcome="{outcome}"}} 1.0' in metrics.render({}, vllm_names=False).decode()
