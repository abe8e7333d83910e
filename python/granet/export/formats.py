"""Trained networks in other forms: dense, compact, ONNX, and as the compressed CPU model.

- dense: a plain state_dict (torch.save): no masks, zeros where weights are inactive
- safetensors: of each masked weight its bits and its active values alone; everything else as it is
- compressed: the state_dict of ``granet_kernels.compress(model)``, for inference on a CPU
- onnx: the dense network in evaluation mode, for onnxruntime and its like

A network that has lost its dead channels (`dead_channels`) is no longer of its class's widths, so that its
state_dict would fit nothing. It is written as a program of torch.export instead, dense or compressed, which
needs no code of the model; or as ONNX.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from granet.files import replacing
from granet_kernels import compress, densify, masked_layers, pack_mask, unpack_mask

FORMATS = ("dense", "safetensors", "compressed", "onnx")
PROGRAMS = ("dense", "compressed", "onnx")
"""Those that a network of other widths than its class's can have."""
VALUES, BITS = ".values", ".mask"
META = "granet_shapes"


def export(model: nn.Module, form: str, path: Path, sample_shape: tuple[int, ...]) -> int:
    """Write a network in one of :data:`FORMATS`.

    Args:
        model: masked or dense, on any device.
        form: the format.
        path: file to write, over whatever is there.
        sample_shape: of one input, without the batch; for ONNX, whose batch is free.

    Returns:
        Bytes of the file.

    Raises:
        ValueError: no such format, or ``compressed`` of a dense model.
        ImportError: a package that the format needs is not installed; names it.
    """
    if form not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {form!r}")
    if form == "onnx":
        _save_onnx(_dense(model), path, sample_shape)
    else:
        with replacing(path) as temporary:
            if form == "safetensors":
                _save_compact(model, temporary)
            else:
                made = _dense(model) if form == "dense" else compress(model)
                with temporary.open("wb") as file:  # for a path the archive has its name inside
                    torch.save(made.state_dict(), file)
    return path.stat().st_size


def export_program(model: nn.Module, form: str, path: Path, sample_shape: tuple[int, ...]) -> int:
    """Write a network as a program, which needs no class to be loaded into; its batch is free.

    Args:
        model: masked or dense, of any widths, such as `dead_channels.remove_dead_channels` gives.
        form: one of :data:`PROGRAMS`; dense and compressed are programs of torch.export.
        path: file to write, over whatever is there.
        sample_shape: of one input, without the batch.

    Returns:
        Bytes of the file.

    Raises:
        ValueError: no such format, or ``compressed`` of a dense model.
        ImportError: a package that the format needs is not installed; names it.
    """
    if form not in PROGRAMS:
        raise ValueError(
            f"format: expected one of {', '.join(PROGRAMS)} for a network without its dead channels, "
            f"got {form!r}"
        )
    if form == "onnx":
        _save_onnx(_dense(model), path, sample_shape)
    else:
        made = compress(model).cpu() if form == "compressed" else _dense(model)
        sample, shapes = _sample(made, sample_shape)
        with torch.no_grad():
            program = torch.export.export(made, sample, dynamic_shapes=shapes)
        with replacing(path) as temporary:
            torch.export.save(program, temporary)
    return path.stat().st_size


def _sample(model: nn.Module, sample_shape: tuple[int, ...]) -> tuple[tuple[Tensor], Any]:
    """An input for tracing, and which of its dimensions are free: the batch."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return (torch.zeros((2, *sample_shape), dtype=dtype),), ({0: torch.export.Dim("batch")},)


def _dense(model: nn.Module) -> nn.Module:
    """A copy for evaluation without masks, on the CPU."""
    dense = densify(model) if masked_layers(model) else model
    return dense.cpu().eval()


def _save_compact(model: nn.Module, path: Path) -> None:
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise ImportError(
            f"format: 'safetensors' needs the package safetensors ({error})"
        ) from error
    tensors, shapes = compacted(model)
    # Not save_file, whose files only their owner may read.
    path.write_bytes(save(tensors, metadata={META: json.dumps(shapes)}))


def compacted(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """Tensors of a network with masked weights as bits and values, and the shapes of those weights."""
    tensors: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    state = model.state_dict()
    for key, value in state.items():
        if key.endswith("packed_mask"):
            continue
        packed = state.get(f"{key.removesuffix('weight')}packed_mask")
        if not key.endswith("weight") or packed is None:
            tensors[key] = value.detach().cpu().contiguous().clone()
            continue
        mask = unpack_mask(packed, value.shape).cpu()
        tensors[key + VALUES] = value.detach().cpu()[mask]
        tensors[key + BITS] = pack_mask(mask)
        shapes[key] = list(value.shape)
    return tensors, shapes


def load_compact(path: Path, model: nn.Module) -> nn.Module:
    """Put a file of :func:`export` with ``safetensors`` into a network of its architecture.

    Masked layers take the masks as well; dense ones take zeros.

    Raises:
        ValueError: the file is not one of these.
        RuntimeError: it is of another architecture, as from ``load_state_dict``.
    """
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata() or {}
        if META not in metadata:
            raise ValueError(f"{path}: expected a network that granet exported, got another file")
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    state = expanded(tensors, json.loads(metadata[META]))
    masks = {f"{key.removesuffix('weight')}packed_mask" for key in json.loads(metadata[META])}
    own = {f"{name}.packed_mask".removeprefix(".") for name in masked_layers(model)}
    model.load_state_dict({k: v for k, v in state.items() if k not in masks or k in own})
    return model


def expanded(tensors: Mapping[str, Tensor], shapes: Mapping[str, list[int]]) -> dict[str, Tensor]:
    """The state_dict, masks included, that :func:`compacted` was made of."""
    state = {
        key: value
        for key, value in tensors.items()
        if not any(key in (name + VALUES, name + BITS) for name in shapes)
    }
    for key, shape in shapes.items():
        values, packed = tensors[key + VALUES], tensors[key + BITS]
        mask = unpack_mask(packed, shape)
        state[key] = torch.zeros(shape, dtype=values.dtype).masked_scatter_(mask, values)
        state[f"{key.removesuffix('weight')}packed_mask"] = packed
    return state


def _save_onnx(dense: nn.Module, path: Path, sample_shape: tuple[int, ...]) -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"format: 'onnx' needs the packages onnx and onnxscript ({error})"
        ) from error
    sample, shapes = _sample(dense, sample_shape)
    program = torch.onnx.export(dense, sample, dynamo=True, dynamic_shapes=shapes, verbose=False)
    assert program is not None
    # Where it belongs, at once: a large network has a second file, which the first one names.
    program.save(path, include_initializers=True)
