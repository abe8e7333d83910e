"""Removal of channels that nothing depends on, from a copy of a network.

Training at high sparsity leaves channels dead: all their weights inactive, so that they are constant,
or all weights of those who read them inactive. Both kinds go, with the input channels of their readers; a
constant is added to the readers' biases. What is removed at one place may free something at
another, so it is repeated until nothing is left.

The outputs stay the same up to rounding, and are compared in fp64 before the result is handed out.
So a channel stays where it cannot be left out exactly: a constant that is not zero in front of a
convolution with zero padding, which cuts it off at the border; a dead channel that is added to one
that is not; channels that reach something that `channel_analysis.Analysis` does not understand.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from granet.export.channel_analysis import Analysis, removable_slots
from granet.export.channels import Channels, Layer, absorbs, is_mixing, taps
from granet_kernels import densify, masked_layers, sparsify
from granet_kernels.nn import MaskedLayer
from granet_kernels.nn.fuse import Untraceable, trace

TOLERANCE = 1e-9
"""Of the largest output, in fp64."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Removal:
    """What is left of a network."""

    model: fx.GraphModule
    """Its parts, their names and its forward, not its class. In evaluation mode, on the CPU."""
    channels: dict[str, tuple[int, int]]
    """Output channels of convolutions and linear layers that have lost some: before, after."""
    dead: tuple[int, int]
    """Output channels without an active weight: before, after."""
    parameters: tuple[int, int]
    """Before, after."""


def remove_dead_channels(model: nn.Module, sample_shape: Sequence[int]) -> Removal:
    """A copy of a model, in evaluation mode, without the channels that nothing depends on.

    Args:
        model: masked or dense, not changed; with masks, the same layers of the copy are masked.
        sample_shape: of one input, without the batch.

    Raises:
        ValueError: the model cannot be traced, or not be run in fp64, or returns no tensor; or the
            outputs differ, because the model does what tracing does not see.
    """
    dense = (densify(model) if masked_layers(model) else copy.deepcopy(model)).cpu().eval()
    dtypes = {name: tensor.dtype for name, tensor in dense.state_dict().items()}
    dense.double().requires_grad_(False)
    example = torch.randn(2, *sample_shape, generator=torch.Generator().manual_seed(0)).double()
    kind = type(model).__name__
    try:
        graph = trace(dense)
    except Untraceable as error:
        raise ValueError(
            f"remove_dead_channels: expected a model that torch.fx can trace, got {kind}: {error}"
        ) from error
    try:
        with torch.no_grad():
            expected = dense(example)
    except RuntimeError as error:
        raise ValueError(
            f"remove_dead_channels: expected a model that runs in fp64 on samples of "
            f"{tuple(sample_shape)}, got {kind}: {error}"
        ) from error
    slim = fx.GraphModule(dense, graph, class_name=f"Slim{kind}")
    before = _facts(slim)
    while _remove_once(slim, example):
        pass
    with torch.no_grad():
        _check_same(slim(example), expected)
    after = _facts(slim)
    _restore_dtypes(slim, dtypes)
    _mask_again(slim, model)
    return Removal(
        model=slim,
        channels={
            name: (count, after.widths[name])
            for name, count in before.widths.items()
            if after.widths[name] != count
        },
        dead=(before.dead, after.dead),
        parameters=(before.parameters, after.parameters),
    )


@dataclass(frozen=True, slots=True)
class _Facts:
    widths: dict[str, int]
    dead: int
    parameters: int


def _facts(model: nn.Module) -> _Facts:
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    return _Facts(
        widths={name: layer.weight.size(0) for name, layer in layers.items()},
        dead=sum(int((~layer.weight.flatten(1).any(1)).sum()) for layer in layers.values()),
        parameters=sum(p.numel() for p in model.parameters()),
    )


def _remove_once(slim: fx.GraphModule, example: Tensor) -> bool:
    """Remove what can be removed as things stand; whether that was anything."""
    analysis = Analysis(slim, example)
    removed = removable_slots(analysis)
    if not removed:
        return False

    def kept(channels: Channels) -> Tensor:
        return torch.tensor([analysis.slots.find(s) not in removed for s in channels.slots])

    for layer in analysis.layers:
        _narrow(layer, kept(layer.input), kept(layer.output))
    for node, (before, after) in analysis.pads.items():
        stays = kept(analysis.of[node])
        first, last = stays[:before], stays[len(stays) - after :]
        positions = [*node.args[1], 0, 0, 0, 0][:4]  # type: ignore[misc]
        node.args = (node.args[0], (*positions, int(first.sum()), int(last.sum())))
    slim.recompile()
    return True


def _narrow(layer: Layer, inputs: Tensor, outputs: Tensor) -> None:
    """Let a layer keep some of its channels; `inputs` and `outputs` are bool."""
    module = layer.module
    if is_mixing(module):
        _take_constants(module, layer.input.constant, ~inputs)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.dim() == 0:  # num_batches_tracked
            continue
        narrowed = tensor[outputs]
        if name == "weight" and is_mixing(module):
            narrowed = narrowed[:, inputs]
        if isinstance(tensor, nn.Parameter):
            setattr(module, name, nn.Parameter(narrowed, requires_grad=False))
        else:
            setattr(module, name, narrowed)
    _set_widths(module, int(inputs.sum()), int(outputs.sum()))


def _take_constants(module: nn.Module, constant: Tensor, removed: Tensor) -> None:
    """Add to the bias what input channels contribute that are removed."""
    used = removed & absorbs(module, constant)  # the others have no weights here
    share = taps(module).sum(2)[:, used] @ constant[used]
    if not share.any():
        return
    if isinstance(module.bias, Tensor):
        share = share + module.bias
    module.bias = nn.Parameter(share, requires_grad=False)


def _set_widths(module: nn.Module, inputs: int, outputs: int) -> None:
    if isinstance(module, nn.Conv2d):
        module.in_channels, module.out_channels = inputs, outputs
        module.groups = 1 if module.groups == 1 else outputs
    elif isinstance(module, nn.Linear):
        module.in_features, module.out_features = inputs, outputs
    elif isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
        module.num_features = outputs


def _check_same(result: object, expected: object) -> None:
    if not isinstance(result, Tensor) or not isinstance(expected, Tensor):
        raise ValueError(
            f"remove_dead_channels: expected a model that returns a tensor, got {type(expected).__name__}"
        )
    limit = TOLERANCE * float(expected.abs().max())
    difference = float((result - expected).abs().max())
    if not difference <= limit:  # NaN included
        raise ValueError(
            f"remove_dead_channels: the outputs differ by {difference:.3g}, more than {limit:.3g}; "
            "forward may depend on what tracing does not see"
        )


def _restore_dtypes(slim: nn.Module, dtypes: dict[str, torch.dtype]) -> None:
    """Round to what each tensor was; a bias that is new has its weight's type."""
    for prefix, module in slim.named_modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                full = f"{prefix}.{name}".removeprefix(".")
                dtype = dtypes.get(full) or dtypes[full.removesuffix("bias") + "weight"]
                tensor.data = tensor.data.to(dtype)


def _mask_again(slim: nn.Module, model: nn.Module) -> None:
    """Mask the layers that were: zeros of their weights are inactive."""
    named = model.named_modules(remove_duplicate=False)
    there = dict(slim.named_modules(remove_duplicate=False))
    names = [name for name, module in named if isinstance(module, MaskedLayer) and name in there]
    if not names:
        return
    sparsify(slim, include=names)
    for layer in masked_layers(slim).values():
        layer.mask = layer.weight != 0
