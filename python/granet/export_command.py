"""The command `granet export`: a run's network in another form."""

from __future__ import annotations

import argparse
from pathlib import Path

from granet.telemetry import BEST, LAST

SUFFIXES = {
    "dense": ".dense.pt",
    "safetensors": ".safetensors",
    "compressed": ".compressed.pt",
    "onnx": ".onnx",
}
LOADING = {
    "dense": "model.load_state_dict(torch.load(FILE))",
    "safetensors": "granet.export.load_compact(FILE, model), masked or dense",
    "compressed": "compress(sparsify(model)).load_state_dict(torch.load(FILE))",
    "onnx": "onnxruntime.InferenceSession(FILE)",
}


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


def run(args: argparse.Namespace) -> int:
    """Write the files, and print their sizes; the exit status."""
    from granet import build  # needs the train extra
    from granet.checkpoint import check_model_state, load_checkpoint
    from granet.export import export

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
    for form in args.format or SUFFIXES:
        target = folder / f"{path.stem}{SUFFIXES[form]}"
        try:
            size = export(model.eval(), form, target, source.sample_shape)
        except (ImportError, ValueError) as error:
            if args.format:
                raise
            print(f"{form}: left out, {error}")
            continue
        print(f"{target}: {size:,} bytes; {LOADING[form]}")
    config = checkpoint.config
    channels = source.sample_shape[0]
    print(
        f"model = granet.models.create_model({config.model!r}, num_classes={source.num_classes}, "
        f"in_channels={channels})"
    )
    return 0
