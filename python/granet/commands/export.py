"""The command `granet export`: a run's network in another form."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from granet.training.telemetry import BEST, LAST

if TYPE_CHECKING:  # which needs the train extra
    from granet.export.dead_channels import Removal

SUFFIXES = {
    "dense": ".dense.pt",
    "safetensors": ".safetensors",
    "compressed": ".compressed.pt",
    "onnx": ".onnx",
}
LOADING = {
    "dense": """\
import torch
from granet.models import create_model
model = {model}
model.load_state_dict(torch.load({file!r}))""",
    "safetensors": """\
from pathlib import Path
from granet.export.formats import load_compact
from granet.models import create_model
from granet_kernels import sparsify
model = load_compact(Path({file!r}), sparsify({model}))  # or dense, without sparsify""",
    "compressed": """\
import torch
from granet.models import create_model
from granet_kernels import compress, sparsify
model = compress(sparsify({model}))
model.load_state_dict(torch.load({file!r}))""",
    "onnx": """\
import onnxruntime
session = onnxruntime.InferenceSession({file!r})""",
}
"""How to load a file, to be pasted."""
SLIM_SUFFIXES = {
    "dense": ".slim.dense.pt2",
    "compressed": ".slim.compressed.pt2",
    "onnx": ".slim.onnx",
}
SLIM_LOADING = {
    "dense": """\
import torch
model = torch.export.load({file!r}).module()""",
    "compressed": """\
import torch
import granet_kernels  # which has the operators
model = torch.export.load({file!r}).module()""",
    "onnx": LOADING["onnx"],
}
Write = Callable[[nn.Module, str, Path, tuple[int, ...]], int]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory, or checkpoint")
    parser.add_argument(
        "--format",
        action="append",
        choices=list(SUFFIXES),
        help="may be repeated (default: all that can be made)",
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="folder (default: that of the checkpoint)"
    )
    parser.add_argument(
        "--remove-dead-channels",
        action="store_true",
        help="leave out channels that nothing depends on, where that can be done exactly. The layers then "
        "have other widths than the model's class, which no state_dict could be loaded into: dense and "
        "compressed become programs of torch.export (.pt2), which need no class; there is no safetensors",
    )


def run(args: argparse.Namespace) -> int:
    """Write the files, and print their sizes; the exit status."""
    from granet.export.formats import export, export_program
    from granet.training import build  # needs the train extra
    from granet.training.checkpoint import check_model_state, load_checkpoint

    if args.remove_dead_channels and "safetensors" in (args.format or ()):
        raise ValueError(
            "format: expected dense, compressed or onnx with remove_dead_channels, got 'safetensors'"
        )
    path = args.run
    if path.is_dir():
        path = path / (BEST if (path / BEST).is_file() else LAST)
    checkpoint = load_checkpoint(path)
    source = build.build_source(checkpoint.config, build.choose_device("cpu"))
    model = build.build_model(checkpoint.config, source, build.choose_device("cpu"))
    check_model_state(path, model, checkpoint.network)
    model.load_state_dict(checkpoint.network)
    folder = args.output or path.parent
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{path}: {path.stat().st_size:,} bytes, optimizer and masks included")
    stem, shape = folder / path.stem, source.sample_shape
    if args.remove_dead_channels:
        from granet.export.dead_channels import remove_dead_channels

        removal = remove_dead_channels(model.eval(), shape)
        print("\n".join(what_went(removal)))
        _write(args, stem, removal.model, shape, export_program, SLIM_SUFFIXES, SLIM_LOADING)
        return 0
    name, classes = checkpoint.config.model, source.num_classes
    architecture = f"create_model({name!r}, num_classes={classes}, in_channels={shape[0]})"
    loading = {form: text.replace("{model}", architecture) for form, text in LOADING.items()}
    _write(args, stem, model.eval(), shape, export, SUFFIXES, loading)
    return 0


def _write(
    args: argparse.Namespace,
    stem: Path,
    model: nn.Module,
    sample_shape: tuple[int, ...],
    write: Write,
    suffixes: Mapping[str, str],
    loading: Mapping[str, str],
) -> None:
    """A file for each format and how to load it, or a line that says why there is none."""
    for form in args.format or suffixes:
        target = stem.with_name(f"{stem.name}{suffixes[form]}")
        try:
            size = write(model, form, target, sample_shape)
        except (ImportError, ValueError) as error:
            if args.format:
                raise
            print(f"{form}: left out, {error}")
            continue
        lines = loading[form].replace("{file!r}", repr(str(target)))
        print(f"{target}: {size:,} bytes")
        print(textwrap.indent(lines, "    "))


def what_went(removal: Removal) -> list[str]:
    """A line a layer that is narrower, and the totals."""
    lines = [
        f"{name or '(the model)'}: {before:,} channels, {after:,} left"
        for name, (before, after) in removal.channels.items()
    ]
    if not removal.channels:
        return ["no channel can be left out"]
    (dead, still), (weights, left) = removal.dead, removal.parameters
    lines.append(
        f"{sum(before - after for before, after in removal.channels.values()):,} channels removed, "
        f"{dead:,} had no active weight, {still:,} such stay; parameters: {weights:,} before, {left:,} after"
    )
    return lines
