"""Writes a model in another layout: Hugging Face's, that of `original/`, or GGUF.

    gptoss convert gpt-oss-20b-F16.gguf models/gpt-oss-20b
    gptoss convert models/gpt-oss-20b gpt-oss-20b.gguf
    gptoss convert ollama:gpt-oss:20b models/original --to original
    gptoss convert models/gpt-oss-20b models/support --merge-adapter adapters/support

Experts in MXFP4 keep their bits, unless an adapter of them is merged. Dense tensors become bfloat16, and the command
says how many that rounded. The source is a folder, a GGUF file, ollama:NAME or a name that `gptoss serve --model`
finds.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import sys
import time
from pathlib import Path

from gptoss.cached_files import default_cache_folder
from gptoss.cli.conversion.adapter_merge import EXPERT_PARAMETERS, AdapterMerge
from gptoss.cli.conversion.model_files import Model
from gptoss.cli.remote.errors import OK, UsageError
from gptoss.cli.remote.options import command_parser
from gptoss.config.errors import ConfigError
from gptoss.engine.model.gguf_config import read_gguf_config
from gptoss.engine.model.lora_file import AdapterError
from gptoss.engine.model.model_config import ModelConfig
from gptoss.engine.model.sources import open_source
from gptoss.engine.model.tensor_source import CheckpointError
from gptoss.gguf_header import SPLIT_NAME, GgufError
from gptoss.harmony.vocabulary_files import VocabularyError
from gptoss.model_locator import locate_model

LAYOUTS = ("hf", "original", "gguf")
LOST = 0.5  # of what an adapter adds, as RMS error, that is worth a warning
SPARE = 1.02  # of the source's size, that the disk must have free
BFLOAT16_GROWTH = 1.5  # of a file whose dense tensors are quantised


def main(argv: list[str] | None = None) -> int:
    args = options_parser().parse_args(argv)
    layout = args.to or ("gguf" if args.out.suffix == ".gguf" else "hf")
    if (layout == "gguf") != (args.out.suffix == ".gguf"):
        raise UsageError(f"OUT is {args.out}: --to gguf needs a name that ends with .gguf, the others a folder")
    if args.requantize_experts and args.merge_adapter is None:
        raise UsageError("--requantize-experts has a meaning only with --merge-adapter")
    started = time.perf_counter()
    try:
        model = convert(
            args.source,
            args.out,
            layout,
            quantize_experts=args.quantize_experts,
            adapter=args.merge_adapter,
            requantize_experts=args.requantize_experts,
        )
    except AdapterError as error:
        raise UsageError(f"--merge-adapter {args.merge_adapter}: {error}") from error
    except (CheckpointError, ConfigError, GgufError, OSError, VocabularyError) as error:
        raise UsageError(str(error)) from error
    sys.stdout.write("".join(f"{line}\n" for line in _report(model, args.out, time.perf_counter() - started)))
    return OK


def options_parser() -> argparse.ArgumentParser:
    """Returns the parser of this command's options."""
    parser = command_parser(__doc__ or "", epilog="")
    parser.add_argument("source", metavar="SOURCE", help="folder, GGUF file, ollama:NAME or name of a model")
    parser.add_argument("out", metavar="OUT", type=Path, help="new folder, or new file that ends with .gguf")
    parser.add_argument("--to", choices=LAYOUTS, help="layout of OUT (default: gguf by its name, else hf)")
    parser.add_argument(
        "--quantize-experts", action="store_true", help="quantise bfloat16 experts to MXFP4, and print the error"
    )
    parser.add_argument(
        "--merge-adapter", metavar="FOLDER", type=Path, help="add a LoRA adapter of PEFT, and print the rounding error"
    )
    parser.add_argument(
        "--requantize-experts",
        action="store_true",
        help="with --merge-adapter: quantise adapted MXFP4 experts again, which loses part of the adapter",
    )
    return parser


def convert(
    name: str,
    out: Path,
    layout: str,
    *,
    quantize_experts: bool = False,
    adapter: Path | None = None,
    requantize_experts: bool = False,
) -> Model:
    """Converts, with `adapter` merged, and returns the model that was read. OUT is whole or not there.

    Raises:
        ConfigError, CheckpointError: the source cannot be read, or the layout cannot hold it.
        AdapterError: the adapter cannot be merged into this model.
    """
    source = locate_model(name, None, default_cache_folder()).folder
    assert source is not None
    model = Model(source, quantize_experts=quantize_experts)
    _check(model, out, layout)
    if adapter is not None:
        model.merge = _checked_merge(adapter, model, requantize_experts=requantize_experts)
    _check_space(model, out)
    making = out.with_name(f".making-{out.name}")
    _remove(making)
    try:
        if layout == "gguf":
            from gptoss.cli.conversion.gguf_file import write_gguf

            write_gguf(model, making)
        else:
            from gptoss.cli.conversion.safetensors_folder import write_folder

            making.mkdir(parents=True)
            write_folder(model, making, original=layout == "original")
        for file in model.source.files:
            file.check_unchanged()
        if model.merge is not None:
            model.merge.check_unchanged()
        _check_written(model, making, out)
        making.rename(out)
    finally:
        _remove(making)
    return model


def _check(model: Model, out: Path, layout: str) -> None:
    """Raises ConfigError for what cannot be written."""
    if layout == "gguf" and SPLIT_NAME.fullmatch(out.name):
        raise ConfigError(f"{out} is named as a part of a split model: the result is one file")
    if model.config.layer_experts or model.config.wide_window:
        raise ConfigError(f"{model.path}: layers differ in experts or windows, which is converted to no other layout")
    if out.exists() or out.is_symlink():
        raise ConfigError(f"{out} exists: name a new file or folder")
    if not model.packed and layout != "hf":
        raise ConfigError(
            f"{model.path} has experts in bfloat16, which layout {layout} does not hold: add --quantize-experts"
        )
    if layout == "gguf" and importlib.util.find_spec("gguf") is None:
        raise ConfigError("writing GGUF requires gguf; install the package's extra 'gguf', or run: pip install gguf")


def _checked_merge(adapter: Path, model: Model, *, requantize_experts: bool) -> AdapterMerge:
    """Reads the adapter.

    Raises AdapterError if it cannot be merged, or only with a loss that was not asked for.
    """
    merge = AdapterMerge(adapter, model.config)
    if merge.expert_parameters and model.source.packed and not requantize_experts:
        raise AdapterError(
            f"it adapts {' and '.join(merge.expert_parameters)}, which {model.path} holds in MXFP4: merging them means "
            "quantising them again, which loses part of the adapter. Add --requantize-experts, or serve it with --lora"
        )
    return merge


def _check_space(model: Model, out: Path) -> None:
    """Creates the folder of OUT. Raises ConfigError if its disk is too small."""
    out.parent.mkdir(parents=True, exist_ok=True)
    size = sum(file.state.num_bytes for file in model.source.files)
    growth = BFLOAT16_GROWTH if model.path.is_file() else SPARE
    free = shutil.disk_usage(out.parent).free
    if not model.quantizes and free < size * growth:
        raise ConfigError(f"{out.parent} has {free / 1e9:.1f} GB free, needs {size * growth / 1e9:.1f}")


def _check_written(model: Model, made: Path, out: Path) -> None:
    """Opens the result as the server would.

    Raises ConfigError if the layout cannot say what the source does.
    """
    config = read_gguf_config(made) if made.is_file() else ModelConfig.from_folder(made)
    expected = model.config
    for key in (name for name in ModelConfig.__slots__ if name != "quantized"):
        if getattr(config, key) != getattr(expected, key):
            raise ConfigError(
                f"{out} cannot hold {key} {getattr(expected, key)!r}: it would be read as {getattr(config, key)!r}"
            )
    open_source(made, config)


def _report(model: Model, out: Path, seconds: float) -> list[str]:
    files = [out] if out.is_file() else list(out.rglob("*"))
    size = sum(path.stat().st_size for path in files)
    lines = [f"{out}: {size / 1e9:.2f} GB in {seconds:.1f} s"]
    if model.num_rounded:
        lines.append(f"{model.num_rounded} dense tensors were rounded to bfloat16")
    if model.quantized_dense:
        kinds = ", ".join(f"{count} in {kind}" for kind, count in model.quantized_dense.items())
        lines.append(f"dense tensors were dequantised to bfloat16 ({kinds}); what their quantisation lost stays lost")
    if model.merge is not None:
        lines += _merge_report(model.merge)
    if model.quantizes:
        lines.append(f"experts were quantised to MXFP4, with a relative RMS error of {model.expert_error:.4f}")
    elif model.merge is not None and model.merge.expert_parameters:
        others = [name for name in EXPERT_PARAMETERS if name not in model.merge.expert_parameters]
        lines += [f"{name} kept its bits" for name in others]
    else:
        lines.append("experts kept their bits")
    return lines


def _merge_report(merge: AdapterMerge) -> list[str]:
    """What rounding the sums lost, of each kind of matrix."""
    lines = [f"merged {merge.file.folder}, of rank {merge.file.rank}:"]
    for kind, error in merge.errors.items():
        lines.append(
            f"  {kind} in {error.stored_as}: relative RMS error {error.relative_rms:.2e}, largest {error.largest:.2e}, "
            f"{error.of_change:.3f} of what the adapter adds"
        )
    if any(error.of_change > LOST for error in merge.errors.values()):
        lines.append("  rounding lost much of what the adapter adds: compare the answers with those of --lora")
    return lines


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
