from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from src.api.access import Access
from src.api.errors import Unauthorized
from src.api.keys import load_callers
from src.config import ServerConfig, load_config, without_secrets
from src.engine.config import ConfigError


def keys_file(tmp_path: Path, text: str) -> ServerConfig:
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    return ServerConfig(api_keys_file=path)


EMPTY_DIGEST = hashlib.sha256(b"").hexdigest()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "holds no key"), ("", "must be a list"), ("{}", "must be a list"), ("- ", "entry 0"),
        ("- {name: a, key: '         '}", "entry 0: key: .*blank"),
        ("- {name: a, key: '\u00a0\u00a0\u00a0\u00a0\u00a0\u00a0\u00a0\u00a0'}", "entry 0: key: .*blank"),
        ("- {name: a, key: 'sk-secret-1 '}", "begins or ends with white space"),
        ("- {name: a, key: \"sk-secret\\n-1\"}", "control character"),
        (f"- {{name: a, sha256: {EMPTY_DIGEST}}}", "digest of an empty key"),
        ("- {name: a, key: sk-secret-1}\n- {name: a, key: sk-secret-2}", "two keys have the name 'a'"),
        ("- {name: a, key: sk-secret-1}\n- {name: b, key: sk-secret-1}", "'a' and 'b' have the same key"),
        ("- {sk-secret-1: alice}", "entry 0"), ("- {name: a, key: sk-secret-1, sk-secret-2: 1}", "known fields: name, key"),
        ("- sk-secret-1", "entry 0"), ("- {name: a, key: [sk-secret-1]}", "entry 0: key"),
        ("- {name: a, key: *sk-secret-1}", "not valid YAML"), ("- {name: a, key: 'sk-secret-1}", "not valid YAML"),
        ("- {name: a, key: 2024-99-99}", "not valid YAML"),
    ],
)  # fmt: skip
def test_a_wrong_keys_file_is_an_error_without_a_key_in_it(
    tmp_path: Path, text: str, message: str
) -> None:
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


def test_an_empty_file_beside_a_key_leaves_that_key(tmp_path: Path) -> None:
    (tmp_path / "keys.yaml").write_text("[]")
    config = ServerConfig(api_key="key-of-the-operator", api_keys_file=tmp_path / "keys.yaml")  # type: ignore[arg-type]
    assert [caller.name for caller in load_callers(config)] == ["default"]


def test_no_digest_lets_a_blank_key_in() -> None:
    access = Access(ServerConfig(api_key="secret-key"))  # type: ignore[arg-type]
    for blank in (b"", b" ", b"\xa0", b"\x85"):
        with pytest.raises(Unauthorized, match="didn't provide"):
            access.identify({b"authorization": b"Bearer " + blank}, "/v1/models")
    assert access.identify({b"authorization": b"Bearer  secret-key "}, "/").name == "anonymous"
    assert access.identify({b"authorization": b"Bearer  secret-key "}, "/stats").name == "default"


@pytest.mark.parametrize("key", ["", " ", "\u00a0", "\t\n", " a-key", "a-key\n", "a\x00key"])
def test_a_key_that_no_client_can_send_is_an_error(
    monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    with pytest.raises(ConfigError, match=r"^api_key \(from flag\)") as error:
        load_config(["--api-key", key])
    assert "got" not in str(error.value)


# --- secrets in errors and reports ---


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("api_key: 12345678", "valid string"), ("api_key: [sk-secret]", "valid string"),
        ("api_key: {a: sk-secret}", "valid string"), ("api_key: 'sk-secret", "not valid YAML"),
        ("api_key: *sk-secret", "not valid YAML"), ("api_key: !sk-secret x", "not valid YAML"),
        ("port: 'http://me:sk-secret@host'", "port"), ("otlp_endpoint: ['http://me:sk-secret@host']", "otlp_endpoint"),
        ("cors_origins: {a: 'http://me:sk-secret@host'}", "cors_origins"),
        ("current_date: 'http://host?token=sk-secret'", "current_date"),
        ("cors_origins: '[http://me:sk-secret@host'", "cors_origins .*not valid YAML"),
    ],
)  # fmt: skip
def test_no_secret_in_a_configuration_error(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        load_config(["--config", str(file)])
    assert "sk-secret" not in str(error.value) and "12345678" not in str(error.value)


@pytest.mark.parametrize(
    "flags", [["--api_key=sk-secret"], ["--api-keys", "sk-secret"], ["sk-secret"], ["-k", "sk-secret"]]
)  # fmt: skip
def test_no_secret_in_an_error_about_flags(
    capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    with pytest.raises(SystemExit):
        load_config(flags)
    assert "sk-secret" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://me:secret@host:4318/v1", "http://***@host:4318/v1"), ("https://token@host", "https://***@host"),
        ("http://me:se@cr/et@host", "http://***@host"), ("http://host/p?key=secret", "http://host/p?***"),
        ("http://host:1/p", "http://host:1/p"), ("[http://a:b@c, http://d]", "[http://***@c, http://d]"),
        ("me@example.org", "me@example.org"),
    ],
)  # fmt: skip
def test_passwords_in_urls_are_masked(text: str, shown: str) -> None:
    assert without_secrets(text) == shown
