"""/v1/files and /v1/batches through openai's client, with an engine that answers at once."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types import Batch, FileObject

from tests.support.instant_engine import served
from tests.support.waiting import wait_until

CHAT = "/v1/chat/completions"
KEYS = "- {name: one, key: key-number-one}\n- {name: two, key: key-number-two}\n"


def request(custom_id: str, url: str = CHAT, **body: Any) -> dict[str, Any]:
    base = {"model": "gpt-oss-nano", "messages": [{"role": "user", "content": "Hi"}]}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": base | body}


def lines(*requests: dict[str, Any] | str) -> bytes:
    return "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in requests).encode()


class Client(openai.OpenAI):
    def __init__(self, url: str, key: str = "key-number-one") -> None:
        super().__init__(base_url=f"{url}/v1", api_key=key, max_retries=0, _strict_response_validation=True)

    def upload(self, content: bytes, **options: Any) -> FileObject:
        return self.files.create(file=("in.jsonl", content), purpose="batch", **options)

    def run(self, content: bytes, endpoint: Any = CHAT, **options: Any) -> Batch:
        file = self.upload(content)
        return self.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h", **options)

    def ended(self, batch: Batch) -> Batch:
        wait_until(lambda: self.batches.retrieve(batch.id).status in ("completed", "failed", "expired", "cancelled"))
        return self.batches.retrieve(batch.id)

    def read(self, file_id: str | None) -> dict[str, dict[str, Any]]:
        assert file_id is not None
        read = [json.loads(line) for line in self.files.content(file_id).text.splitlines()]
        found = {line["custom_id"]: line for line in read}
        assert len(found) == len(read)
        return found


@contextmanager
def running(folder: Path, **settings: Any) -> Iterator[str]:
    keys = folder / "keys.yaml"
    keys.write_text(KEYS)
    with served(batch_dir=folder / "batches", api_keys_file=keys, **settings) as url:
        yield url


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running(tmp_path_factory.mktemp("batches"), batch_quota_bytes=300_000, batch_max_file_bytes=100_000) as found:
        yield found


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    with Client(url) as made:
        yield made


@pytest.fixture
def other(url: str) -> Iterator[Client]:
    with Client(url, "key-number-two") as made:
        yield made


def test_a_batch_from_upload_to_answers(client: Client) -> None:
    requests = [request(f"r{i}") for i in range(20)] + [request("bad", temperature=9)]
    batch = client.run(lines(*requests), metadata={"run": "1"})
    assert batch.status in ("validating", "in_progress")
    assert (batch.endpoint, batch.completion_window, batch.metadata) == (CHAT, "24h", {"run": "1"})
    assert batch.expires_at == batch.created_at + 86_400
    done = client.ended(batch)
    assert done.status == "completed" and done.errors is None and done.model == "gpt-oss-nano"
    assert done.request_counts is not None and done.usage is not None
    assert done.request_counts.model_dump() == {"total": 21, "completed": 20, "failed": 1}
    assert done.usage.total_tokens == done.usage.input_tokens + done.usage.output_tokens > 0
    assert done.completed_at and done.finalizing_at and done.in_progress_at
    answers = client.read(done.output_file_id)
    assert answers.keys() == {f"r{i}" for i in range(20)}
    assert answers["r3"]["response"]["body"]["choices"][0]["message"]["content"] == "Hi."
    error = client.read(done.error_file_id)["bad"]["response"]
    assert (error["status_code"], error["body"]["error"]["param"]) == (400, "temperature")
    output = client.files.retrieve(done.output_file_id or "")
    assert (output.purpose, output.filename) == ("batch_output", f"{batch.id}_output.jsonl")


@pytest.mark.parametrize(
    ("endpoint", "fields"),
    [("/v1/completions", {"prompt": "Hi"}), ("/v1/responses", {"input": "Hi"}), ("/v1/messages", {"max_tokens": 20})],
)
def test_the_other_endpoints(client: Client, endpoint: str, fields: dict[str, Any]) -> None:
    row = request("a", endpoint, **fields)
    done = client.ended(client.run(lines(row), endpoint))
    assert client.read(done.output_file_id)["a"]["response"]["status_code"] == 200
    assert done.usage is not None and done.usage.output_tokens > 0 and done.error_file_id is None


def test_a_file_that_is_not_a_batch_fails_and_says_which_line(client: Client) -> None:
    done = client.ended(client.run(lines(request("a"), "{", request("a"), request("b", "/v1/completions"))))
    assert done.status == "failed" and done.failed_at and done.errors is not None
    assert [(e.line, e.code) for e in done.errors.data or []] == [
        (2, "invalid_json_line"),
        (3, "duplicate_custom_id"),
        (4, "mismatched_url"),
    ]
    assert (done.output_file_id, done.error_file_id) == (None, None)


def test_files_are_listed_by_pages_and_deleted(client: Client) -> None:
    made = [client.upload(b"x\n" * (i + 1), expires_after={"anchor": "created_at", "seconds": 3600}) for i in range(5)]
    assert made[2].bytes == 6 and made[2].expires_at == made[2].created_at + 3600
    ids = [file.id for file in client.files.list(limit=2, purpose="batch")]
    assert ids[:5] == [file.id for file in reversed(made)]
    assert [f.id for f in client.files.list(after=made[3].id, limit=1).data] == [made[2].id]
    ascending = client.files.list(order="asc", after=made[0].id)
    assert [f.id for f in ascending.data][:4] == [file.id for file in made[1:]] and not ascending.has_next_page()
    for file in made:
        assert client.files.delete(file.id).deleted
        with pytest.raises(openai.NotFoundError, match="No such File"):
            client.files.retrieve(file.id)


def test_batches_are_listed_by_pages(other: Client) -> None:
    made = [other.run(lines(request("a"))) for _ in range(3)]
    assert [batch.id for batch in other.batches.list(limit=2)] == [batch.id for batch in reversed(made)]
    with pytest.raises(openai.NotFoundError):
        other.batches.list(after="batch_none")


def test_another_key_sees_nothing(client: Client, other: Client) -> None:
    batch = client.ended(client.run(lines(request("a"))))
    file_id = batch.output_file_id or ""
    calls: list[Callable[[], object]] = [
        lambda: other.files.retrieve(file_id),
        lambda: other.files.content(file_id),
        lambda: other.files.delete(file_id),
        lambda: other.batches.retrieve(batch.id),
        lambda: other.batches.cancel(batch.id),
        lambda: other.batches.create(input_file_id=batch.input_file_id, endpoint=CHAT, completion_window="24h"),
    ]
    for call in calls:
        with pytest.raises(openai.NotFoundError):
            call()
    assert file_id not in [f.id for f in other.files.list()]
    assert batch.id not in [b.id for b in other.batches.list()]
    assert client.files.retrieve(file_id)


@pytest.mark.parametrize(
    "file_id", ["file-..%2f..%2flock", "..%2f..%2flock", "file-" + "0" * 24, "file-%00", "x" * 5000]
)
def test_ids_that_are_no_ids(url: str, file_id: str) -> None:
    headers = {"authorization": "Bearer key-number-one"}
    for path in (f"/v1/files/{file_id}", f"/v1/files/{file_id}/content", f"/v1/batches/{file_id}"):
        assert httpx.get(url + path, headers=headers).status_code == 404


def post(url: str, path: str = "/v1/files", **options: Any) -> httpx.Response:
    headers = {"authorization": "Bearer key-number-one"} | options.pop("headers", {})
    return httpx.post(url + path, headers=headers, **options)


FILE = {"file": ("a.jsonl", b"{}")}
BOUNDARY = {"content-type": "multipart/form-data; boundary=B"}
PART = b'--B\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'


@pytest.mark.parametrize(
    ("options", "status", "param"),
    [
        ({"files": FILE}, 400, "purpose"),
        ({"files": FILE, "data": {"purpose": "vision"}}, 400, "purpose"),
        ({"files": {"other": b"x"}, "data": {"purpose": "batch"}}, 400, "file"),
        ({"files": {"file": b""}, "data": {"purpose": "batch"}}, 400, "file"),
        ({"files": [*FILE.items()] * 2, "data": {"purpose": "batch"}}, 400, "file"),
        (
            {"files": FILE, "data": {"purpose": "batch", "expires_after[anchor]": "created_at"}},
            400,
            "expires_after[seconds]",
        ),
        (
            {
                "files": FILE,
                "data": {"purpose": "batch", "expires_after[anchor]": "created_at", "expires_after[seconds]": "60"},
            },
            400,
            "expires_after[seconds]",
        ),
        ({"files": FILE, "data": {"purpose": "x" * 70_000}}, 400, None),
        ({"files": {"file": b"x" * 100_001}, "data": {"purpose": "batch"}}, 413, "file"),
        ({"files": {"file": b"x" * 400_000}, "data": {"purpose": "batch"}}, 413, "file"),
        ({"json": {"purpose": "batch"}}, 415, None),
        ({"content": PART + b"{}", "headers": BOUNDARY}, 400, None),
        ({"content": b"nonsense", "headers": BOUNDARY}, 400, None),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, 400, None),
        ({"content": b"x", "headers": {"content-type": f"multipart/form-data; boundary={'B' * 500}"}}, 400, None),
    ],
)
def test_uploads_that_are_refused_leave_nothing(
    url: str, client: Client, options: dict[str, Any], status: int, param: str | None
) -> None:
    before = [file.id for file in client.files.list()]
    answer = post(url, **options)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["param"] == param
    assert [file.id for file in client.files.list()] == before
    assert post(url, files=FILE, data={"purpose": "batch"}).status_code == 200


def test_an_upload_that_breaks_off_is_removed(tmp_path: Path) -> None:
    with running(tmp_path, batch_quota_bytes=10_000) as url, Client(url) as client:
        host, port = url.removeprefix("http://").split(":")
        for _ in range(3):  # each would take most of the quota
            with socket.create_connection((host, int(port))) as connection:
                head = f"POST /v1/files HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer key-number-one\r\n"
                head += "Content-Type: multipart/form-data; boundary=B\r\nContent-Length: 9999\r\n\r\n"
                connection.sendall(head.encode() + PART + b"x" * 8000)
                time.sleep(0.05)
        contents = tmp_path / "batches" / "contents"
        wait_until(lambda: not [*contents.iterdir()])
        assert client.upload(b"x" * 8000).bytes == 8000
        with pytest.raises(openai.RateLimitError, match="more than 10000 bytes"):
            client.upload(b"x" * 8000)
        with Client(url, "key-number-two") as other:
            assert other.upload(b"x" * 8000).bytes == 8000
        assert len([*contents.iterdir()]) == 2


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"completion_window": "1h"}, "completion_window"),
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"input_file_id": None}, "input_file_id"),
        ({"metadata": {"a": "x" * 513}}, "metadata"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 60}}, "output_expires_after.seconds"),
        ({"endpoint": None}, "endpoint"),
    ],
)
def test_batches_that_are_refused(url: str, client: Client, changes: dict[str, Any], param: str) -> None:
    file = client.upload(lines(request("a")))
    body = {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h"} | changes
    answer = post(url, "/v1/batches", json={key: value for key, value in body.items() if value is not None})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_without_a_folder_the_endpoints_say_how_to_switch_them_on() -> None:
    with served() as url, Client(url) as client:
        for call in (client.files.list, client.batches.list, lambda: client.upload(b"x")):
            with pytest.raises(openai.NotFoundError, match="--batch-dir") as raised:
                call()
            assert raised.value.code == "batches_off"


def test_a_web_site_cannot_make_a_browser_upload(url: str) -> None:
    data = {"purpose": "batch"}
    assert post(url, files=FILE, data=data, headers={"origin": "https://evil.example"}).status_code == 403
    assert post(url, files=FILE, data=data, headers={"origin": url}).status_code == 200


def test_cancelling_keeps_the_answers_there_are(tmp_path: Path) -> None:
    with served("x " * 50, 0.005, batch_dir=tmp_path) as url, Client(url) as client:
        batch = client.run(lines(*(request(f"r{i}", max_tokens=10 if i < 20 else 40) for i in range(60))))
        wait_until(lambda: (client.batches.retrieve(batch.id).request_counts or batch.request_counts).completed > 3)  # type: ignore[union-attr]
        with pytest.raises(openai.BadRequestError, match="has not ended"):
            client.files.delete(batch.input_file_id)
        assert client.batches.cancel(batch.id).status in ("cancelling", "cancelled")
        done = client.ended(batch)
        assert done.status == "cancelled" and done.cancelled_at and done.cancelling_at
        answers, errors = client.read(done.output_file_id), client.read(done.error_file_id)
        assert answers.keys() | errors.keys() == {f"r{i}" for i in range(60)} and not answers.keys() & errors.keys()
        assert {line["error"]["code"] for line in errors.values()} == {"batch_cancelled"}
        assert client.batches.cancel(batch.id).status == "cancelled"
        counts = done.request_counts
        assert counts is not None and (counts.completed, counts.failed) == (len(answers), len(errors))


def test_a_batch_that_is_not_done_in_time_expires(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with served("x " * 50, 0.1, batch_dir=tmp_path, batch_expiry_s=1) as url, Client(url) as client:
        with caplog.at_level("INFO"):
            done = client.ended(client.run(lines(*(request(f"r{i}") for i in range(3)))))
        assert done.status == "expired" and done.expired_at
        assert {line["error"]["code"] for line in client.read(done.error_file_id).values()} == {"batch_expired"}
        assert "3 of 3 requests were not run" in caplog.text
        figures = httpx.get(f"{url}/metrics").text
        assert "gptoss_batch_requests_total{" in figures
        expired = [
            line
            for line in figures.splitlines()
            if line.startswith("gptoss_batch_requests_total") and "expired" in line
        ]
        assert expired[0].endswith(" 3.0")
        with pytest.raises(openai.BadRequestError, match="expired cannot be cancelled"):
            client.batches.cancel(done.id)


def test_a_server_that_is_started_again_continues(tmp_path: Path) -> None:
    with served("x " * 50, 0.005, batch_dir=tmp_path) as url, Client(url) as client:
        batch = client.run(lines(*(request(f"r{i}", max_tokens=5 + i) for i in range(60))))
        wait_until(lambda: (client.batches.retrieve(batch.id).request_counts or batch.request_counts).completed > 5)  # type: ignore[union-attr]
    with served(batch_dir=tmp_path) as url, Client(url) as client:
        done = client.ended(batch)
        assert done.status == "completed"
        assert client.read(done.output_file_id).keys() == {f"r{i}" for i in range(60)}
        assert done.request_counts is not None and done.request_counts.completed == 60
