"""Requests made from /openapi.json, valid and not: none is answered with a 5xx.

In the suite 500, to the API with an engine that answers at once. A long run, `--any-requests 10000`, sends other ones
each time to a real server.
"""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode

from tests.support.helpers import checkpoint
from tests.support.instant_engine import served
from tests.support.server_process import running_server

SUITE_REQUESTS = 500
MAX_TOKENS = 4
CHOICES = 2
LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
GENERATES = ("/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses")
WEIGHTS = {"/v1/chat/completions": 4, "/v1/messages": 2, "/v1/responses": 5, "/v1/completions": 5, "/tokenize": 3}
PLAIN = {"messages": [{"role": "user", "content": "Hi"}], "input": "Hi", "prompt": "Hi"}
SPARE = 1.2  # not every case has variants
FIELDS = 4  # of a request with few
REPEATS = 4  # a case costs more to make than to send


class Sender:
    """Sends cases to a server and collects what is wrong with its answers."""

    def __init__(self, url: str) -> None:
        self.statuses: Counter[int] = Counter()
        self.problems: list[str] = []
        self._url, self._session = url, requests.Session()

    def send(self, case: Case) -> None:
        response = case.call(base_url=self._url, session=self._session, timeout=30)
        self.statuses[response.status_code] += 1
        problem = _problem(response)
        if problem is not None:
            self.problems.append(f"{problem}\n{case.as_curl_command()}")


def _problem(response: requests.Response) -> str | None:
    if response.status_code >= 500:
        return f"{response.status_code}: {response.text[:500]}"
    if response.status_code >= 400 and "error" not in response.json():
        return f"no error body: {response.text[:500]}"
    if '"server_error"' in response.text:
        return f"an error within the answer: {response.text[-500:]}"
    return None


def variants(case: Case, rng: random.Random) -> Iterator[Case]:
    """The case as it is, and with few of its fields, half of these with an input that is right: with many fields one of
    them is refused before the others are used."""
    whole = case.body
    if not isinstance(whole, dict):
        yield case
        return
    schema = case.operation.body[0].optimized_schema
    required = _required(schema, whole) if isinstance(schema, dict) else set()
    optional = [name for name in whole if name not in required]
    for repeat in range(REPEATS):
        kept = required | set(rng.sample(optional, min(FIELDS, len(optional))))
        body = {k: v for k, v in whole.items() if repeat == 0 or k in kept}
        if repeat >= REPEATS // 2:
            body |= {name: value for name, value in PLAIN.items() if name in body}
        case.body = _bounded(body, case.path) if case.path in GENERATES else body
        yield case


def _required(schema: dict[str, Any], body: dict[str, Any]) -> set[str]:
    """The required fields, of several forms of a body those of the one it has."""
    forms = [set(form.get("required", ())) for form in schema.get("anyOf", [schema])]
    return next((required for required in forms if required <= body.keys()), set())


def _bounded(body: dict[str, Any], path: str) -> dict[str, Any]:
    """With a model that is there, and little to generate."""
    if isinstance(body.get("model"), str):
        body["model"] = "gpt-oss-nano"
    for name in ("n", "best_of"):
        if _exceeds(body.get(name), CHOICES):
            body[name] = CHOICES
    limit = 16 if path.endswith("responses") else MAX_TOKENS  # of a response 16 at least
    for name in LIMITS:
        if _exceeds(body.get(name), limit):
            body[name] = limit
    if not any(body.get(name) for name in LIMITS):
        body["max_output_tokens" if path.endswith("responses") else "max_tokens"] = limit
    return body


def _exceeds(value: Any, limit: int) -> bool:
    return isinstance(value, int) and value > limit


def _weight(operation: Any) -> float:
    """Of the requests its part; of an operation without a body or parameters there is a single one."""
    return WEIGHTS.get(operation.path, 1 if operation.body else 0.5 if "{" in operation.path else 0)


@contextlib.contextmanager
def _api(long: bool) -> Iterator[str]:
    if not long:
        with served() as url:
            yield url
        return
    flags = ("--model", str(checkpoint()), "--cpu-kv-cache-gib", "0.1", "--max-model-len", "1024")
    with running_server(*flags, "--debug-endpoints", "--log-level", "error") as server:
        yield server.url
        server.wait_idle()


def test_no_request_is_answered_with_a_5xx(
    request: pytest.FixtureRequest, record_property: Callable[[str, object], None]
) -> None:
    wanted = request.config.getoption("--any-requests") or SUITE_REQUESTS
    with _api(long=wanted > SUITE_REQUESTS) as url:
        sender = _send_all(url, wanted)
    record_property("statuses", dict(sender.statuses))
    assert not sender.problems, "\n\n".join(sender.problems[:5])
    assert sender.statuses.total() >= wanted, sender.statuses
    assert sender.statuses[200] > 0.1 * wanted, sender.statuses


def _send_all(url: str, wanted: int) -> Sender:
    schema = schemathesis.openapi.from_dict(httpx.get(f"{url}/openapi.json").json())
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) > 15
    share = SPARE * wanted / sum(_weight(operation) for operation in operations)
    sender, rng = Sender(url), random.Random(0 if wanted == SUITE_REQUESTS else None)
    for operation in operations:
        requests_each = REPEATS if operation.body else 1
        num_cases = max(1, round(share * _weight(operation) / requests_each))

        @settings(
            max_examples=num_cases,
            deadline=None,
            database=None,
            derandomize=wanted == SUITE_REQUESTS,
            phases=(Phase.generate,),
            suppress_health_check=list(HealthCheck),
        )
        @given(case=st.one_of(*map(operation.as_strategy, GenerationMode)))
        def send(case: Case) -> None:
            for variant in variants(case, rng):
                sender.send(variant)

        send()
    return sender
