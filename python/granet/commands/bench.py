"""The command `granet bench`: throughput of a network, dense and sparse, on the devices present."""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from granet.commands.tables import show
from granet.distributions import DISTRIBUTIONS
from granet_kernels import BackendUnavailableError, use_backend

if TYPE_CHECKING:  # the measuring needs the train extra
    from granet.throughput.steps import Mode, Setting

MODES = ("training", "inference")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
AMP_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.description = (
        "Measure steps of a network, dense and at each sparsity, in turn, beside what the machine could "
        "reach. Training is forward, backward and optimizer (dense: fused SGD; masked: MaskedSGD). "
        "Inference: dense with batch norms folded, masked as it is, and compressed on a CPU. Masks are "
        "random."
    )
    _add_network(parser.add_argument_group("network"))
    _add_machine(parser.add_argument_group("machine"))
    measuring = parser.add_argument_group("measuring")
    measuring.add_argument(
        "--mode", default=",".join(MODES), help="training, inference, or both (default)"
    )
    measuring.add_argument(
        "--rounds",
        type=int,
        default=9,
        metavar="N",
        help="turns that each network gets (default: 9)",
    )
    measuring.add_argument("--csv", type=Path, metavar="FILE", help="also write the rows to FILE")


def _add_network(group: Any) -> None:
    group.add_argument(
        "--model", default="resnet18_cifar", metavar="NAME", help="as for granet train"
    )
    group.add_argument("--num-classes", type=int, default=10, metavar="N", help="(default: 10)")
    group.add_argument(
        "--input-size",
        default="3,32,32",
        metavar="C,H,W",
        help="channels, height and width of an image (default: 3,32,32)",
    )
    group.add_argument(
        "-b", "--batch-size", type=int, default=64, metavar="N", help="images (default: 64)"
    )
    group.add_argument(
        "--sparsity",
        default="0.8,0.9,0.95,0.98",
        metavar="X,X",
        help="shares of the weights that are zero (default: 0.8,0.9,0.95,0.98)",
    )
    group.add_argument(
        "--distribution",
        choices=tuple(DISTRIBUTIONS),
        default="erk",
        help="how a sparsity is spread over the layers (default: erk)",
    )
    group.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of weights, masks and images (default: 0)"
    )


def _add_machine(group: Any) -> None:
    group.add_argument(
        "--device", default="all", metavar="NAME", help="cpu, cuda, cuda:N, auto or all (default)"
    )
    group.add_argument("--backend", metavar="NAME", help="force a backend of granet_kernels")
    group.add_argument(
        "--dtype",
        choices=tuple(DTYPES),
        default="float32",
        help="of weights and images (default: float32)",
    )
    group.add_argument("--amp", action="store_true", help="automatic mixed precision")
    group.add_argument(
        "--amp-dtype",
        choices=tuple(AMP_DTYPES),
        default="float16",
        help="compute type under --amp (default: float16)",
    )
    group.add_argument(
        "--channels-last", action="store_true", help="images and weights in that memory format"
    )
    group.add_argument(
        "--torchcompile", "--compile", action="store_true", help="compile with torch.compile"
    )
    group.add_argument(
        "--threads", type=int, metavar="N", help="of the CPU (default: PyTorch's own choice)"
    )


def run(args: argparse.Namespace) -> int:
    """Measure and print, a table for each device and mode; the exit status."""
    from granet.throughput.measure import measure
    from granet.throughput.report import LEGEND, device_line, table, write_rows
    from granet.training.build import choose_device  # needs the train extra

    modes = chosen_modes(args.mode)
    sparsities = numbers(
        "sparsity", args.sparsity, float, "numbers in [0, 1)", lambda x: 0 <= x < 1
    )
    settings = [make_setting(args, device) for device in chosen_devices(args.device, choose_device)]
    for name in ("rounds", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected a whole number of at least 1, got {value}")
    if args.csv and not args.csv.parent.is_dir():
        raise FileNotFoundError(f"csv: expected a folder, found none at {args.csv.parent}")
    processors = os.cpu_count() or 1
    if args.threads is not None and args.threads > processors:
        raise ValueError(
            f"threads: expected at most this machine's {processors} processors, got {args.threads}"
        )
    with ExitStack() as stack:
        stack.enter_context(_chosen_machine(args))
        file = None
        title = heading(args, settings[0])
        for setting, mode in itertools.product(settings, modes):
            results, failures = measure(setting, mode, sparsities, rounds=args.rounds)
            print(f"{title}\n{device_line(setting, results[0])}\n{mode}:")
            title = ""
            show(*table(results))
            print("".join(f"{line}\n" for line in map(str, failures)), end="")
            if args.csv and file is None:  # not before there is something to write over it
                file = stack.enter_context(args.csv.open("w", newline="", encoding="utf-8"))
            if file:
                write_rows(file, setting, results)
    print(LEGEND)
    return 0


@contextmanager
def _chosen_machine(args: argparse.Namespace) -> Iterator[None]:
    """Backend and threads as asked for, and cuDNN's choice by measuring, as in training."""
    threads, benchmark = torch.get_num_threads(), torch.backends.cudnn.benchmark
    try:
        backend = nullcontext() if args.backend is None else use_backend(args.backend)
    except BackendUnavailableError as error:
        raise ValueError(str(error)) from error
    with backend:
        try:
            torch.backends.cudnn.benchmark = True
            torch.set_num_threads(args.threads or threads)
            yield
        finally:
            torch.backends.cudnn.benchmark = benchmark
            torch.set_num_threads(threads)


def numbers(
    name: str, text: str, kind: Callable[[str], Any], expected: str, fits: Callable[[Any], bool]
) -> list[Any]:
    """Those of an argument that has some, with commas between them.

    Raises:
        ValueError: one is no number, or does not fit.
    """
    try:
        found = [kind(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(map(fits, found)):
        raise ValueError(f"{name}: expected {expected}, with commas between them, got {text!r}")
    return found


def chosen_modes(text: str) -> tuple[Mode, ...]:
    """Modes in the order of the tables."""
    wanted = text.split(",")
    if not set(wanted) <= set(MODES):
        raise ValueError(f"mode: expected some of {', '.join(MODES)}, got {text!r}")
    return tuple(mode for mode in MODES if mode in wanted)  # type: ignore[misc]


def chosen_devices(name: str, choose_device: Callable[[str], torch.device]) -> list[torch.device]:
    """The devices of that name; `all` are the CPU and, where there is one, the current card."""
    if name != "all":
        return [choose_device(name)]
    names = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return [choose_device(name) for name in names]


def make_setting(args: argparse.Namespace, device: torch.device) -> Setting:
    """What the arguments ask for on a device.

    Raises:
        ValueError: one is out of its range.
    """
    from granet.throughput.steps import Setting

    shape = numbers(
        "input_size", args.input_size, int, "channels, height and width", lambda x: x >= 1
    )
    if len(shape) != 3:
        raise ValueError(f"input_size: expected channels,height,width, got {args.input_size!r}")
    for name in ("batch_size", "num_classes"):
        if getattr(args, name) < 1:
            raise ValueError(
                f"{name}: expected a whole number of at least 1, got {getattr(args, name)}"
            )
    if args.amp and args.dtype != "float32":
        raise ValueError(f"amp: expected dtype float32 with it, got {args.dtype}")
    return Setting(
        model=args.model,
        num_classes=args.num_classes,
        sample_shape=tuple(shape),
        batch_size=args.batch_size,
        device=device,
        dtype=DTYPES[args.dtype],
        amp_dtype=AMP_DTYPES[args.amp_dtype] if args.amp else None,
        channels_last=args.channels_last,
        torchcompile=args.torchcompile,
        distribution=args.distribution,
        seed=args.seed,
    )


def heading(args: argparse.Namespace, setting: Setting) -> str:
    """What holds for all tables."""
    flags = [
        f"{args.distribution} masks",
        args.dtype,
        *([f"amp {args.amp_dtype}"] if args.amp else []),
        *(["channels_last"] if args.channels_last else []),
        *(["torch.compile"] if args.torchcompile else []),
        f"rounds: {args.rounds}",
        f"torch {torch.__version__}",
    ]
    shape = "x".join(map(str, setting.sample_shape))
    return f"{setting.model}, batch {setting.batch_size}, {shape}: {', '.join(flags)}"
