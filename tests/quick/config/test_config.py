from __future__ import annotations

import itertools
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from gptoss.config.engine_keys import DeviceKeys, EngineKeys
from gptoss.config.errors import ConfigError
from gptoss.config.profiles import PROFILES, Profile
from gptoss.config.schema import GROUPS, KEYS, ServerConfig
from gptoss.config.sources import DEFAULT_CONFIG_FILE, OTHER_PROGRAMS_ENV, describe, load_config, service_variables
from gptoss.engine.config import EngineConfig
from gptoss.engine.model.model_config import ModelConfig
from gptoss.engine.model.named_sizes import SIZES, hf_config, original_config
from gptoss.harmony.special_tokens import PROBE_TOKEN_IDS
from scripts.write_config import outputs


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GPTOSS_PORT", "GPTOSS_CONFIG", "TORCH_DTYPE"):
        monkeypatch.delenv(name, raising=False)


def test_the_yaml_holds_every_key_with_its_default() -> None:
    values = yaml.safe_load(DEFAULT_CONFIG_FILE.read_text())
    assert list(values) == list(KEYS)
    assert values == {key: field.get_default(call_default_factory=True) for key, field in KEYS.items()}
    for line in DEFAULT_CONFIG_FILE.read_text().splitlines():
        assert not line or line.startswith("#") or "  # " in line, f"no comment: {line}"


@pytest.mark.parametrize("path", outputs(), ids=lambda path: path.name)
def test_a_file_that_is_made_from_the_keys_is_up_to_date(path: Path) -> None:
    assert path.read_text() == outputs()[path], "run scripts/write_config.py"


def test_the_page_lists_every_key_and_every_profile_setting() -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "configuration.md").read_text()
    for key in [*KEYS, *(name for name in Profile.__dataclass_fields__ if name != "name")]:
        assert f"| `{key}` |" in page, key


def test_the_help_has_every_flag_in_the_group_of_its_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        load_config(["--help"])
    text = capsys.readouterr().out
    for group, after in itertools.pairwise([*GROUPS, None]):
        part = text.partition(f"\n{group.__doc__}:\n")[2]
        part = part.partition(f"\n{after.__doc__}:\n")[0] if after else part
        for key in group.__dataclass_fields__:
            assert f"  --{key.replace('_', '-')} " in part, key


def test_a_key_stands_in_one_group_and_says_what_it_does() -> None:
    assert list(KEYS) == [key for group in GROUPS for key in group.__dataclass_fields__]
    assert all(field.description for field in KEYS.values())
    assert not [key for key, field in KEYS.items() if str(field.description).endswith((", s", ", bytes", ", GiB"))]


def test_the_engine_gets_its_groups_of_the_configuration() -> None:
    from gptoss import startup

    model = ModelConfig.from_json(hf_config(SIZES["nano"]))
    located: Any = SimpleNamespace(config=model, folder=None)
    config = load_config(
        ["--profile", "quality_first", "--load-format", "dummy", "--block-size", "16", "--max-num-seqs", "3"]
    )[0]
    engine = startup.engine_config(config, located, SimpleNamespace(ranks_path=Path("ranks")))  # type: ignore[arg-type]
    left = {"max_model_len", "max_num_seqs", "max_num_batched_tokens", "max_num_waiting", "batch_invariant"}
    left.add("weights_cache_dir")  # unset: in the cache folder, which the engine's process does not know
    for group in (DeviceKeys, EngineKeys):
        for key in group.__dataclass_fields__:
            if key not in left:
                assert getattr(engine, key) == getattr(config, key), key
    quality = PROFILES["quality_first"]
    assert (engine.block_size, engine.max_num_seqs, engine.max_model_len) == (16, 3, model.max_position)
    assert engine.max_num_batched_tokens == quality.max_num_batched_tokens
    assert (engine.max_num_waiting, engine.batch_invariant) == (quality.max_num_waiting, True)
    assert engine.probe_token_ids == PROBE_TOKEN_IDS  # the engine itself knows no special token
    assert pickle.loads(pickle.dumps(engine)) == engine


def test_flags_beat_the_environment_which_beats_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("port: 1001\nhost: 0.0.0.0\n")
    config, origin, _ = load_config(["--config", str(file)])
    assert (config.port, origin["port"]) == (1001, str(file))
    monkeypatch.setenv("GPTOSS_PORT", "1002")
    config, origin, _ = load_config(["--config", str(file)])
    assert (config.port, origin["port"]) == (1002, "environment GPTOSS_PORT")
    config, origin, _ = load_config(["--config", str(file), "--port", "1003"])
    assert (config.port, origin["port"], config.host) == (1003, "flag", "0.0.0.0")


def test_torch_dtype_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_DTYPE", "float16")
    assert load_config([])[0].dtype == "float16"
    assert load_config(["--dtype", "float32"])[0].dtype == "float32"


def test_torchruns_variables_are_read_where_torchrun_started_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500", "GROUP_WORLD_SIZE": "2", "GROUP_RANK": "1"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    config = load_config([])[0]
    assert (config.nnodes, config.node_rank, config.master_addr) == (1, 0, None), "another program's"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    config = load_config(["--master-addr", "10.0.0.9"])[0]
    assert (config.nnodes, config.node_rank, config.master_addr) == (2, 1, "10.0.0.9")
    assert config.master_port == 29500
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert load_config([])[0].master_port == 29501, "the other one is torchrun's"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="use --nproc-per-node 1"):
        load_config([])


def test_auto_is_a_number_of_engines() -> None:
    assert load_config(["--data-parallel-size", "auto"])[0].data_parallel_size == 0
    assert load_config(["--data-parallel-size", "3"])[0].data_parallel_size == 3
    with pytest.raises(ConfigError, match="data_parallel_size"):
        load_config(["--data-parallel-size", "all"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot: 8000", "prot .*unknown key"),
        ("port: 99999", "port .*less than or equal to 65535"),
        ("- 1", "keys and values"),
        ("port: [", "not valid YAML"),
        ("dtype: int8", "dtype"),
    ],
)
def test_bad_files_are_errors_that_name_the_key(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(["--config", str(file)])


def test_a_misspelt_environment_variable_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTOSS_PROT", "1")
    with pytest.raises(ConfigError, match="GPTOSS_PROT"):
        load_config([])


def test_a_missing_file_is_an_error() -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(["--config", "/nowhere.yaml"])


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_sets_what_is_not_set(name: str) -> None:
    config = load_config(["--profile", name])[0]
    assert config.resolved("max_num_seqs") == PROFILES[name].max_num_seqs
    assert config.resolved("batch_invariant") == PROFILES[name].batch_invariant
    explicit = load_config(["--profile", name, "--max-num-seqs", "3", "--no-batch-invariant"])[0]
    assert (explicit.resolved("max_num_seqs"), explicit.resolved("batch_invariant")) == (3, False)


def test_print_config_says_where_each_value_came_from() -> None:
    config, origin, wanted = load_config(["--print-config", "--port", "9"])
    assert wanted
    text = describe(config, origin)
    assert "port: 9  # flag" in text
    assert "max_num_seqs: 32  # profile balanced" in text
    assert yaml.safe_load(text)["block_size"] == 64


def test_impossible_engine_limits_name_the_key_and_the_fix() -> None:
    model = ModelConfig.from_json(hf_config(SIZES["nano"]))
    for options, message in (
        ({"max_num_seqs": 64, "max_num_batched_tokens": 32}, "max_num_batched_tokens .* raise it"),
        ({"max_model_len": 200_000}, "max_model_len .* beyond the model's 131072"),
        ({"block_size": 48}, "block_size .* power of two"),
    ):
        with pytest.raises(ConfigError, match=message):
            EngineConfig(model, None, load_format="dummy", **options)  # type: ignore[arg-type]


def test_both_layouts_of_config_json_mean_the_same() -> None:
    for size in SIZES.values():
        assert ModelConfig.from_json(hf_config(size)) == ModelConfig.from_json(original_config(size))


def test_rope_parameters_of_newer_transformers_are_read() -> None:
    raw = hf_config(SIZES["20b"])
    new = {k: v for k, v in raw.items() if k not in ("rope_theta", "rope_scaling")}
    new["rope_parameters"] = {**raw["rope_scaling"], "rope_theta": raw["rope_theta"]}
    assert ModelConfig.from_json(new) == ModelConfig.from_json(raw)


def test_the_model_is_the_flags_then_the_profiles_then_the_embedded_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from gptoss import startup

    monkeypatch.setattr(startup, "visible_gpus", lambda: ["a GPU"])
    assert startup.choose_model(ServerConfig(model="120b", profile="latency_first")) == "120b"
    assert startup.choose_model(ServerConfig(profile="latency_first")) == "20b"
    assert startup.choose_model(ServerConfig(profile="quality_first")) == "120b"
    changed = ServerConfig(profile="balanced", profiles={"balanced": {"model": "120b"}})
    assert startup.choose_model(changed) == "120b"
    monkeypatch.setattr(startup, "visible_gpus", lambda: [])
    assert startup.choose_model(ServerConfig(profile="quality_first")) == "nano"


def test_a_missing_checkpoint_or_gpu_is_said_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    from gptoss.cli.preflight import MISSING, main, missing
    from gptoss.engine.parallel.gpus import Gpu

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = missing("20b", None, [])
    assert [text.split(":")[0] for text in found] == ["checkpoint", "GPU"]
    small = Gpu(0, "NVIDIA T4", 16 * 10**9, 15 * 10**9, None, None)
    assert "does not fit" in missing("120b", None, [small])[1] and "T4" in missing("120b", None, [small])[1]
    assert missing("nano", None, []) == []
    assert (main(["--model", "120b"]), main(["--model", "nano"])) == (MISSING, 0)


SERVICES = {
    "GPTOSS_SERVICE_HOST": "10.0.0.7",
    "GPTOSS_SERVICE_PORT": "8000",
    "GPTOSS_SERVICE_PORT_HTTP": "8000",
    "GPTOSS_PORT": "tcp://10.0.0.7:8000",
    "GPTOSS_PORT_8000_TCP": "tcp://10.0.0.7:8000",
    "GPTOSS_PORT_8000_TCP_PROTO": "tcp",
    "GPTOSS_PORT_8000_TCP_PORT": "8000",
    "GPTOSS_PORT_8000_TCP_ADDR": "10.0.0.7",
    "GPTOSS_CACHE_SERVICE_HOST": "10.0.0.8",
    "GPTOSS_CACHE_PORT": "udp://10.0.0.8:53",
    "GPTOSS_AUTO_PORT": "tcp://10.0.0.9:80",
    "GPTOSS_AUTO_PORT_53_UDP_ADDR": "10.0.0.9",
    "GPTOSS_MY_CACHE_2_SERVICE_PORT_METRICS_2": "9090",
}


def test_kubernetes_service_variables_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SERVICES.items():
        monkeypatch.setenv(name, value)
    config, origin, _ = load_config([])
    assert (config.port, config.auto_port) == (8000, False)
    assert not [source for source in origin.values() if source.startswith("environment")]
    assert service_variables() == sorted(SERVICES)


@pytest.mark.parametrize("name", sorted(OTHER_PROGRAMS_ENV - {"GPTOSS_CONFIG"}))
def test_variables_of_our_other_programs_are_not_the_servers(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    before = load_config([])[:2]
    monkeypatch.setenv(name, "http://127.0.0.1:8000")
    assert load_config([])[:2] == before


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("GPTOSS_CACHE_PORT", "8000"),
        ("GPTOSS_SERVICE_HOSTS", "x"),
        ("GPTOSS_PORT_8000_ICMP", "x"),
        ("GPTOSS_PORT_X_TCP", "x"),
        ("GPTOSS_PORT_8000_TCP_NAME", "x"),
        ("GPTOSS_URLS", "x"),
    ],
)
def test_what_only_looks_like_a_service_variable_is_an_error(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"{name}: unknown key"):
        load_config([])


BOOLEANS = [k for k, f in KEYS.items() if f.annotation in (bool, bool | None)]


@pytest.mark.parametrize("key", BOOLEANS)
def test_every_boolean_flag_takes_a_value(key: str) -> None:
    flag = key.replace("_", "-")
    needed = ["--request-mcp-hosts", "[a.example]"]  # by allow_request_mcp_urls
    for argv, wanted in (
        ([f"--{flag}"], True),
        ([f"--no-{flag}"], False),
        ([f"--{flag}", "true"], True),
        ([f"--{flag}", "false"], False),
        ([f"--{flag}=False"], False),
        ([f"--{flag}", "--port", "9"], True),
    ):
        assert getattr(load_config([*argv, *needed])[0], key) is wanted, argv


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--warm-up", "maybe"], "--warm-up: must be true or false, got 'maybe'"),
        (["--no-warm-up", "true"], "--no-warm-up: takes no value, got 'true'"),
    ],
)
def test_a_boolean_flag_refuses_other_values(capsys: pytest.CaptureFixture[str], argv: list[str], message: str) -> None:
    with pytest.raises(SystemExit):
        load_config(argv)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "shown"),
    [
        (["--api-kye=S3CRET"], "unknown flags: --api-kye\n"),
        (["--api-kye", "S3CRET"], "unknown flags: --api-kye\n"),
        (["--api-kye:S3CRET"], "unknown flags: one that is not shown"),
        (["--sk-proj-S3CRET"], "unknown flags: one that is not shown"),
        (["--prot=1", "--sk-S3CRET+/=S3CRET"], "unknown flags: --prot, one that is not shown"),
        (["S3CRET"], "every flag begins with --"),
    ],
)
def test_unknown_flags_are_named_without_a_secret(
    flags: list[str], shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        load_config(flags)
    told = capsys.readouterr().err
    assert shown in told and "S3CRET" not in told


@pytest.mark.parametrize(
    "flags, environment, found",
    [
        (["--lora", "a=/x", "--lora=b=y=z"], None, {"a": "/x", "b": "y=z"}),
        ([], "a=/x", {"a": "/x"}),
        ([], "{a: /x, b: /y}", {"a": "/x", "b": "/y"}),
        (["--lora", "c=/z"], "a=/x", {"c": "/z"}),
    ],
)
def test_adapters_are_names_with_folders(
    monkeypatch: pytest.MonkeyPatch, flags: list[str], environment: str | None, found: dict[str, str]
) -> None:
    if environment is not None:
        monkeypatch.setenv("GPTOSS_LORA", environment)
    config, origin, _ = load_config(flags)
    assert config.lora == {name: Path(folder) for name, folder in found.items()}
    assert f"lora: {yaml.safe_dump(found, default_flow_style=True).strip()}" in describe(config, origin)


@pytest.mark.parametrize("flags, problem", [(["a"], "must be NAME=PATH"), (["a=/x", "a=/y"], "'a' is given twice")])
def test_adapters_without_a_name_or_with_one_name_are_refused(flags: list[str], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        load_config([f"--lora={flag}" for flag in flags])


@pytest.mark.parametrize("value", ["", " "])
def test_an_empty_path_of_a_draft_head_is_not_the_working_folder(value: str) -> None:
    with pytest.raises(ConfigError, match=r"speculative_model \(from flag\) is empty: name a folder, or unset it"):
        load_config(["--speculative-model", value])
