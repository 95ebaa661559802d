from __future__ import annotations

import asyncio
import hashlib
import json
import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send

from gptoss.api.access.access import Access
from gptoss.api.access.api_keys import ApiKeys, anonymous, digest_of, load_callers
from gptoss.api.access.hosts import HostCheck, is_loopback
from gptoss.api.http.body import check_content_type, read_json_object
from gptoss.api.http.errors import Unauthorized, UnsupportedMediaType
from gptoss.api.http.limited_paths import LimitedPaths
from gptoss.api.http.sender import Sender
from gptoss.api.http.work_pool import WorkPool
from gptoss.api.middleware.auth import AuthMiddleware
from gptoss.config.errors import ConfigError
from gptoss.config.schema import ServerConfig
from gptoss.config.sources import describe, load_config
from gptoss.config.text import masked_value, without_secrets
from gptoss.startup import check_access


def keys_file(tmp_path: Path, text: str) -> ServerConfig:
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    return ServerConfig(api_keys_file=path)


EMPTY_DIGEST = hashlib.sha256(b"").hexdigest()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "holds no key"),
        ("", "is empty"),
        ("{}", "must be a list"),
        ("- ", "entry 0"),
        ("- {name: a, key: '         '}", "entry 0: key: .*blank"),
        ("- {name: a, key: '\u00a0\u00a0\u00a0\u00a0\u00a0\u00a0\u00a0\u00a0'}", "entry 0: key: .*blank"),
        ("- {name: a, key: 'sk-secret-1 '}", "begins or ends with white space"),
        ('- {name: a, key: "sk-secret\\n-1"}', "control character"),
        (f"- {{name: a, sha256: {EMPTY_DIGEST}}}", "digest of an empty key"),
        ("- {name: a, key: sk-secret-1}\n- {name: a, key: sk-secret-2}", "two keys have the name 'a'"),
        ("- {name: a, key: sk-secret-1}\n- {name: b, key: sk-secret-1}", "'a' and 'b' have the same key"),
        ("- {sk-secret-1: alice}", "entry 0"),
        ("- {name: a, key: sk-secret-1, sk-secret-2: 1}", "known fields: name, key"),
        ("- sk-secret-1", "entry 0"),
        ("- {name: a, key: [sk-secret-1]}", "entry 0: key"),
        ("- {name: a, key: *sk-secret-1}", "not valid YAML"),
        ("- {name: a, key: 'sk-secret-1}", "not valid YAML"),
        ("- {name: a, key: 2024-99-99}", "not valid YAML"),
    ],
)
def test_a_wrong_keys_file_is_an_error_without_a_key_in_it(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        load_callers(keys_file(tmp_path, text))
    assert "sk-secret" not in str(error.value)


def test_a_keys_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(ConfigError, match="api_keys_file"):
            load_callers(ServerConfig(api_keys_file=path))
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_callers(ServerConfig(api_keys_file=tmp_path / "binary"))


def test_keys_from_a_pipe_are_read_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipe = tmp_path / "keys"
    os.mkfifo(pipe)
    config = ServerConfig(api_keys_file=pipe)
    writer = threading.Thread(target=pipe.write_text, args=("- {name: a, key: key-of-a}",))
    writer.start()
    keys = ApiKeys(config, check_access(config, {}))
    writer.join()
    assert not keys.reload() and "is a pipe" in caplog.text
    assert Access(keys).report()["keys"] == 1


def test_an_empty_file_beside_a_key_leaves_that_key(tmp_path: Path) -> None:
    (tmp_path / "keys.yaml").write_text("[]")
    config = ServerConfig(api_key="key-of-the-operator", api_keys_file=tmp_path / "keys.yaml")  # type: ignore[arg-type]
    assert [caller.name for caller in load_callers(config)] == ["default"]


def test_no_digest_lets_a_blank_key_in() -> None:
    keys = ApiKeys(ServerConfig(api_key="secret-key"))  # type: ignore[arg-type]
    for blank in (b"", b" ", b"\xa0", b"\x85"):
        with pytest.raises(Unauthorized, match="didn't provide"):
            keys.identify({b"authorization": b"Bearer " + blank})
    assert keys.identify({b"authorization": b"Bearer  secret-key "}).name == "default"


def test_open_paths_do_not_read_the_key() -> None:
    seen: dict[str, str] = {}

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen[scope["path"]] = scope["state"]["caller"].name

    async def ask(path: str) -> None:
        config = ServerConfig(api_key="secret-key")  # type: ignore[arg-type]
        headers = [(b"authorization", b"Bearer secret-key")]
        scope = {"type": "http", "method": "GET", "path": path, "headers": headers}
        await AuthMiddleware(app, config, Access(ApiKeys(config)), LimitedPaths())(scope, Any, Any)  # type: ignore[arg-type]

    for path in ("/", "/stats"):
        asyncio.run(ask(path))
    assert seen == {"/": "anonymous", "/stats": "default"}


@pytest.mark.parametrize("key", ["", " ", "\u00a0", "\t\n", " a-key", "a-key\n", "a\x00key", "\u200b", "schlüssel"])
def test_a_key_that_no_client_can_send_is_an_error(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    with pytest.raises(ConfigError, match=r"^api_key \(from flag\)") as error:
        load_config(["--api-key", key])
    assert "got" not in str(error.value)


# --- secrets in errors and reports ---


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("api_key: 12345678", "valid string"),
        ("api_key: [sk-secret]", "valid string"),
        ("api_key: {a: sk-secret}", "valid string"),
        ("api_key: 'sk-secret", "not valid YAML"),
        ("api_key: *sk-secret", "not valid YAML"),
        ("api_key: !sk-secret x", "not valid YAML"),
        ("port: 'http://me:sk-secret@host'", "port"),
        ("otlp_endpoint: ['http://me:sk-secret@host']", "otlp_endpoint"),
        ("cors_origins: {a: 'http://me:sk-secret@host'}", "cors_origins"),
        ("current_date: 'http://host?token=sk-secret'", "current_date"),
        ("cors_origins: '[http://me:sk-secret@host'", "cors_origins .*not valid YAML"),
        ("host: {api_key: sk-secret}", "host"),
        ("api_keys_file: [{key: sk-secret}]", "api_keys_file"),
        ("sk-secret-1: x", "not shown .*unknown key"),
        ("api_key: !sk-secret'x y", "not valid YAML"),
        ("profiles: {sk-secret: {}}", "profiles"),
        ("port: 'me:sk-secret@host'", "port"),
        ("port: 'http://h/;token=sk-secret'", "port"),
        ("api_key: &sk-secret", "has no value"),
        ("api_keys_file:", "has no value"),
        ("api_keys_file: ' '", "is empty"),
    ],
)
def test_no_secret_in_a_configuration_error(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        load_config(["--config", str(file)])
    assert "sk-secret" not in str(error.value) and "12345678" not in str(error.value)


@pytest.mark.parametrize(
    "flags", [["--api_key=sk-secret"], ["--api-keys", "sk-secret"], ["sk-secret"], ["-k", "sk-secret"]]
)
def test_no_secret_in_an_error_about_flags(capsys: pytest.CaptureFixture[str], flags: list[str]) -> None:
    with pytest.raises(SystemExit):
        load_config(flags)
    assert "sk-secret" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://me:secret@host:4318/v1", "http://***@host:4318/v1"),
        ("https://token@host", "https://***@host"),
        ("http://me:se@cr/et@host", "http://***@host"),
        ("http://host/p?key=secret", "http://host/p?***"),
        ("http://host:1/p", "http://host:1/p"),
        ("[http://a:b@c, http://d]", "[http://***@c, http://d]"),
        ("me@example.org", "me@example.org"),
        ("http:/me:secret@host", "http:/***@host"),
        ("http://me:se'c\"r et@host", "http://***@host"),
        ("me:secret@host:4318", "***@host:4318"),
        ("//me:secret@host", "//***@host"),
        ("http:\\\\me:secret@host", "http:\\\\***@host"),
        ("http:me:secret@host", "***@host"),
        ("http://h/;token=secret", "http://h/;***"),
        ("http://h/#token=se'cret", "http://h/#***"),
        ("h:1/?a_token=secret", "h:1/?a_token=***"),
    ],
)
def test_passwords_in_urls_are_masked(text: str, shown: str) -> None:
    assert without_secrets(text) == shown
    if not text.startswith("["):
        assert "secret" not in masked_value(text)
    assert "secret" not in describe(ServerConfig(otlp_endpoint=text), {})


# --- which hosts, and who shares a cache ---


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("::1", True),
        ("localhost", True),
        ("::ffff:127.0.0.1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("", False),
        ("192.0.2.1", False),
        ("no.such.name.invalid", False),
    ],
)
def test_which_addresses_are_of_this_machine_alone(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


@pytest.mark.parametrize(
    ("options", "allowed", "refused"),
    [
        ({}, "localhost localhost: 127.0.0.1:8000 127.1.2.3 [::1]", "evil.example 10.0.0.1 [fe80::1] 127.0.0.1%x"),
        ({"host": "::1"}, "localhost [::1]:80", "evil.example"),
        ({"host": "0.0.0.0"}, "localhost evil.example 10.0.0.1 what:ever:", ""),
        (
            {"host": "0.0.0.0", "allowed_hosts": ["a.example", "2001:db8::1"]},
            "A.example:1 localhost [2001:db8::1]",
            "b.example",
        ),
        ({"allowed_hosts": []}, "localhost", "a.example"),
        ({"allowed_hosts": ["*"]}, "a.example", ""),
    ],
)
def test_which_hosts_are_answered(options: dict[str, Any], allowed: str, refused: str) -> None:
    check = HostCheck(ServerConfig(**options))
    assert [name for name in allowed.split() if not check.allows(name.encode())] == []
    assert [name for name in refused.split() if check.allows(name.encode())] == []


@pytest.mark.parametrize("name", ["http://a", "a:80", "a/b", "", "*.a", "[::1]"])
def test_an_allowed_host_is_a_name_or_an_address(name: str) -> None:
    with pytest.raises(ConfigError, match="allowed_hosts .*not a host name or address"):
        load_config(["--allowed-hosts", json.dumps([name])])


def test_keys_that_differ_share_no_cache_unless_it_is_switched_on(tmp_path: Path) -> None:
    two = "- {name: a, key: key-of-a}\n- {name: b, key: key-of-b}"
    a, b = load_callers(keys_file(tmp_path, two))
    apart = ApiKeys(keys_file(tmp_path, two))
    assert apart.cache_scope(a) == apart.cache_scope(a) != apart.cache_scope(b)
    assert "" not in (apart.cache_scope(a), apart.cache_scope(b))
    assert apart.cache_scope(a) != ApiKeys(keys_file(tmp_path, two)).cache_scope(a), "not to be guessed"
    shared = ApiKeys(ServerConfig(api_keys_file=tmp_path / "keys.yaml", shared_prefix_cache=True))
    assert shared.cache_scope(a) == shared.cache_scope(b) == ""
    alone = ApiKeys(ServerConfig(api_key="secret-key"))  # type: ignore[arg-type]
    assert alone.cache_scope(None) == alone.cache_scope(anonymous(ServerConfig())) == ""
    former, later = (replace(a, digest=digest_of(key)) for key in ("a-key-of-before", "a-new-key"))
    assert alone.cache_scope(former) not in ("", alone.cache_scope(later)), "a key may be replaced"


def test_a_websocket_is_refused() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise AssertionError("not asked for a key")

    async def connect() -> Message:
        return {"type": "websocket.connect"}

    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    config = ServerConfig(api_key="secret-key")  # type: ignore[arg-type]
    middleware = AuthMiddleware(app, config, Access(ApiKeys(config)), LimitedPaths())
    asyncio.run(middleware({"type": "websocket", "path": "/", "headers": []}, connect, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_a_server_that_is_open_to_the_network_says_so(caplog: pytest.LogCaptureFixture) -> None:
    for options, logged in (
        ({"host": "0.0.0.0"}, True),
        ({"host": "::"}, True),
        ({"host": "127.0.0.1"}, False),
        ({"host": "0.0.0.0", "api_key": "secret-key"}, False),
    ):
        caplog.clear()
        check_access(ServerConfig(**options), {})
        assert ("no API key is set" in caplog.text) is logged, options
    with pytest.raises(ConfigError, match="require_api_key"):
        check_access(ServerConfig(require_api_key=True), {})
    check_access(ServerConfig(api_key="secret-key"), {"api_key": "flag"})  # type: ignore[arg-type]
    assert "command line" in caplog.text and "secret-key" not in caplog.text


# --- which bodies are read ---


def body_request(body: bytes, **headers: str) -> Request:
    sent = {"content-length": str(len(body))} | {k.replace("_", "-"): v for k, v in headers.items()}

    async def receive() -> Message:
        return {"type": "http.request", "body": body}

    raw = [(name.encode(), value.encode()) for name, value in sent.items()]
    return Request({"type": "http", "method": "POST", "headers": raw}, receive)


@pytest.mark.parametrize(
    "content_type", ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=a"]
)
def test_a_switch_takes_bodies_of_any_type(content_type: str) -> None:
    def read(required: bool, *, named: bool = True) -> dict[str, Any]:
        headers = {"content_type": content_type} if named else {}
        config = ServerConfig(require_json_content_type=required)
        request = body_request(b'{"a": 1}', **headers)
        return asyncio.run(read_json_object(request, Sender(""), config, WorkPool()))

    for named in (True, False):
        with pytest.raises(UnsupportedMediaType, match="Send the header 'Content-Type: application/json'"):
            read(True, named=named)
        assert read(False, named=named) == {"a": 1}


def test_no_body_needs_no_type() -> None:
    check_content_type(Headers({"content-length": "0"}))
    check_content_type(Headers({}))
    with pytest.raises(UnsupportedMediaType, match="the request has none"):
        check_content_type(Headers({"transfer-encoding": "chunked"}))


def test_a_value_that_is_not_utf_8_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTOSS_API_KEY", "\udcff-key")
    with pytest.raises(ConfigError, match=r"^api_key \(from environment .*not UTF-8"):
        load_config([])


def test_probes_may_send_any_host() -> None:
    config = ServerConfig(allowed_hosts=[])

    async def answer(path: str) -> int:
        sent: list[Message] = []

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})

        async def receive() -> Message:
            return {"type": "http.request"}

        async def send(message: Message) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "GET", "path": path, "headers": [(b"host", b"10.0.0.1")]}
        await AuthMiddleware(app, config, Access(ApiKeys(config)), LimitedPaths())(scope, receive, send)
        return int(sent[0]["status"])

    paths = ("/health", "/ready", "/stats")
    assert [asyncio.run(answer(path)) for path in paths] == [200, 200, 403]
