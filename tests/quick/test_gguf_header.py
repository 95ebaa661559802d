"""Headers of GGUF files: what is read, and that a hostile one is an error and no allocation."""

from __future__ import annotations

import resource
import struct
from pathlib import Path
from typing import Any

import pytest

from gptoss.engine.model.gguf_config import read_gguf_config
from gptoss.gguf_header import GgufError, read_model, read_strings

U32, F32, BOOL, STRING, ARRAY = 4, 6, 7, 8, 9


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def key(name: str, kind: int, data: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + data


def tensor(name: str, sizes: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


def header(keys: list[bytes], infos: list[bytes], data: bytes = b"", **counts: int) -> bytes:
    numbers = struct.pack(
        "<4sIQQ",
        b"GGUF",
        counts.get("version", 3),
        counts.get("num_tensors", len(infos)),
        counts.get("num_keys", len(keys)),
    )
    body = numbers + b"".join(keys) + b"".join(infos)
    return body + bytes(-len(body) % 32) + data


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


def test_keys_and_tensors_are_read(file: Path) -> None:
    names = struct.pack("<IQ", STRING, 2) + text("a") + text("ö")
    keys = [
        key("n", U32, struct.pack("<I", 7)),
        key("x", F32, struct.pack("<f", 0.5)),
        key("is", BOOL, b"\1"),
        key("name", STRING, text("gpt")),
        key("names", ARRAY, names),
        key("sizes", ARRAY, struct.pack("<IQ3I", U32, 3, 1, 2, 3)),
    ]
    file.write_bytes(header(keys, [tensor("t", [64, 2], kind=39)], bytes(68)))
    model = read_model(file)
    assert {k: v for k, v in model.keys.items() if k != "names"} == {
        "n": 7,
        "x": 0.5,
        "is": True,
        "name": "gpt",
        "sizes": [1, 2, 3],
    }
    assert read_strings(model.keys["names"]) == ["a", "ö"]
    found = model.tensors["t"]
    assert (found.shape, found.type.name, found.num_bytes) == ((2, 64), "MXFP4", 68)
    assert found.offset + 68 == file.stat().st_size


HUGE = 1 << 60
ALIGN = key("general.alignment", U32, struct.pack("<I", 0))
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "another format": (b"PK\3\4" + bytes(60), "is not a GGUF file"),
    "cut in the counts": (b"GGUF\3\0\0\0\1", "truncated or damaged"),
    "version 1": (header([], [], version=1), "version 1"),
    "big-endian": (header([], [], version=3 << 24), "big-endian"),
    "many tensors": (header([], [], num_tensors=HUGE), f"{HUGE} tensors do not fit"),
    "many keys": (header([], [], num_keys=HUGE), f"{HUGE} keys do not fit"),
    "a long key": (header([struct.pack("<Q", HUGE)], [], bytes(64)), "a key do not fit"),
    "a long value": (header([key("k", STRING, struct.pack("<Q", HUGE))], []), "key 'k' do not fit"),
    "a long array": (header([key("k", ARRAY, struct.pack("<IQ", U32, HUGE))], []), f"'k' with {HUGE} values"),
    "a long list": (header([key("k", ARRAY, struct.pack("<IQ", STRING, HUGE))], []), f"'k' with {HUGE} strings"),
    "a list cut off": (header([key("k", ARRAY, struct.pack("<IQQ", STRING, 1, 99))], []), "truncated: key 'k'"),
    "nested arrays": (header([key("k", ARRAY, struct.pack("<IQ", ARRAY, 1))], []), "unsupported type 9"),
    "an unknown type": (header([key("k", 99, b"")], [], bytes(64)), "'k' has the unknown type 99"),
    "a key twice": (header([key("k", BOOL, b"\1")] * 2, []), "key 'k' is there twice"),
    "no UTF-8": (header([key("k", STRING, text(b"\xff"))], []), "key 'k' is not UTF-8"),
    "no alignment": (header([ALIGN], []), "general.alignment is 0"),
    "no dimension": (header([], [tensor("t", [])], bytes(64)), "tensor 't' has 0 dimensions"),
    "many dimensions": (header([], [tensor("t", [1] * 5)], bytes(64)), "tensor 't' has 5 dimensions"),
    "an empty dimension": (header([], [tensor("t", [0, 4])], bytes(64)), "tensor 't' has shape"),
    "half a block": (header([], [tensor("t", [48], kind=39)], bytes(64)), "which MXFP4 cannot have"),
    "a huge tensor": (header([], [tensor("t", [HUGE, HUGE])], bytes(64)), "is truncated: tensor 't'"),
    "a tensor behind the end": (header([], [tensor("t", [16], offset=32)], bytes(64)), "ends at byte"),
    "a tensor between": (header([], [tensor("t", [1], offset=4)], bytes(64)), "begins at 4"),
    "an unknown tensor type": (header([], [tensor("t", [1], kind=77)], bytes(64)), "'t' has the unknown type 77"),
    "a tensor twice": (header([], [tensor("t", [1])] * 2, bytes(64)), "tensor 't' is there twice"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header_is_an_error_that_allocates_nothing(file: Path, name: str) -> None:
    data, message = HOSTILE[name]
    file.write_bytes(data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(GgufError, match=message.replace("(", r"\(")) as error:
        read_model(file)
    assert str(file) in str(error.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000, "kB"


def test_a_header_cut_anywhere_is_an_error(file: Path) -> None:
    names = struct.pack("<IQ", STRING, 2) + text("ab") + text("c")
    whole = header([key("names", ARRAY, names), key("n", U32, bytes(4))], [tensor("t", [8])], bytes(32))
    file.write_bytes(whole)
    read_model(file)
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(GgufError):
            read_model(file)


def split(folder: Path, numbers: list[int], count: int = 2, tensors: int = 2) -> Path:
    folder.mkdir(exist_ok=True)
    for number in numbers:
        keys = [
            key("split.no", U32, struct.pack("<I", number)),
            key("split.count", U32, struct.pack("<I", count)),
            key("split.tensors.count", U32, struct.pack("<I", tensors)),
        ]
        path = folder / f"m-{number + 1:05d}-of-00002.gguf"
        path.write_bytes(header(keys, [tensor(f"t{number}", [8])], bytes(32)))
    return folder / "m-00001-of-00002.gguf"


def test_a_split_model_is_read_whole_from_any_of_its_files(tmp_path: Path) -> None:
    first = split(tmp_path, [0, 1])
    for path in (first, tmp_path / "m-00002-of-00002.gguf"):
        assert {name: t.path.name for name, t in read_model(path).tensors.items()} == {
            "t0": "m-00001-of-00002.gguf",
            "t1": "m-00002-of-00002.gguf",
        }


@pytest.mark.parametrize("named", ["m-00001-of-00002.gguf", ""], ids=["file", "folder"])
def test_a_split_model_is_found_through_links_to_files_without_its_names(tmp_path: Path, named: str) -> None:
    from gptoss.model_locator import _find

    split(tmp_path / "blobs", [0, 1])
    (snapshot := tmp_path / "snapshot").mkdir()
    for number, path in enumerate(sorted((tmp_path / "blobs").iterdir())):
        (snapshot / path.name).symlink_to(path.rename(path.with_name(f"sum{number}")))  # as in the Hub's cache
    found = _find(str(snapshot / named), str(snapshot / named), None)
    assert read_model(found).tensors.keys() == {"t0", "t1"}
    assert _find(str(tmp_path / "blobs" / "sum0"), "", None).name == "sum0"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"numbers": [0]}, r"m-00002-of-00002\.gguf is missing"),
        ({"numbers": [0, 1], "count": 3}, "split.count is 3"),
        ({"numbers": [0, 1], "tensors": 9}, "have 2 tensors, split.tensors.count is 9"),
    ],
)
def test_a_split_model_that_is_not_whole_is_an_error(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(GgufError, match=message):
        read_model(split(tmp_path, **changes))


def shape_keys(**changes: bytes | None) -> list[bytes]:
    sizes = {"block_count": 2, "embedding_length": 64, "expert_count": 4, "expert_used_count": 2}
    sizes |= {"attention.head_count": 2, "attention.head_count_kv": 1, "attention.sliding_window": 128}
    keys: dict[str, bytes | None] = {
        f"gpt-oss.{n}": key(f"gpt-oss.{n}", U32, struct.pack("<I", v)) for n, v in sizes.items()
    }
    keys["gpt-oss.context_length"] = key("gpt-oss.context_length", U32, struct.pack("<I", 131_072))
    for name, value in {"attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 150_000.0}.items():
        keys[f"gpt-oss.{name}"] = key(f"gpt-oss.{name}", F32, struct.pack("<f", value))
    keys["general.architecture"] = key("general.architecture", STRING, text("gpt-oss"))
    return [data for data in (keys | changes).values() if data is not None]


SHAPES = [tensor("token_embd.weight", [1, 8]), tensor("blk.0.ffn_gate_exps.weight", [1, 32, 1], offset=32)]


def test_the_shape_comes_from_keys_and_tensors(file: Path) -> None:
    from gptoss.engine.model.model_config import FULL, SLIDING

    file.write_bytes(header(shape_keys(), SHAPES, bytes(160)))
    found = read_gguf_config(file)
    assert (found.num_layers, found.hidden_size, found.intermediate_size, found.vocab_size) == (2, 64, 32, 8)
    assert (found.rms_norm_eps, found.rope_theta, found.layer_types) == (1e-5, 150_000.0, (SLIDING, FULL))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": key("general.architecture", STRING, text("llama"))}, "is 'llama'"),
        ({"gpt-oss.block_count": None}, "key gpt-oss.block_count is missing"),
        ({"gpt-oss.block_count": key("gpt-oss.block_count", STRING, text("2"))}, "gpt-oss.block_count is '2'"),
        ({"gpt-oss.block_count": key("gpt-oss.block_count", U32, bytes(4))}, "gpt-oss.block_count is 0"),
        ({"gpt-oss.rope.freq_base": key("gpt-oss.rope.freq_base", F32, struct.pack("<f", float("nan")))}, "is nan"),
        (
            {"gpt-oss.block_count": key("gpt-oss.block_count", F32, struct.pack("<f", float("inf")))},
            "block_count is inf",
        ),
        (
            {"gpt-oss.block_count": key("gpt-oss.block_count", F32, struct.pack("<f", 1.5))},
            "1.5, expected a whole number",
        ),
        (
            {"gpt-oss.block_count": key("gpt-oss.block_count", U32, b"\xff" * 4)},
            "block_count is 4294967295, but it has 2",
        ),
        ({"gpt-oss.rope.scaling.type": key("gpt-oss.rope.scaling.type", STRING, text("linear"))}, "type is 'linear'"),
        (
            {"gpt-oss.attention.value_length": key("gpt-oss.attention.value_length", U32, struct.pack("<I", 32))},
            "value_length is 32",
        ),
        ({"gpt-oss.expert_used_count": key("gpt-oss.expert_used_count", U32, struct.pack("<I", 9))}, "is 9, above"),
    ],
)
def test_a_shape_that_is_not_whole_is_an_error(file: Path, changes: dict[str, bytes | None], message: str) -> None:
    from gptoss.config.errors import ConfigError

    file.write_bytes(header(shape_keys(**changes), SHAPES, bytes(160)))
    with pytest.raises(ConfigError, match=message):
        read_gguf_config(file)
