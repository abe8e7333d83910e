"""Making a model sparse, and dense again."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

from torch import nn

from granet_kernels.nn.layers import MaskedConv2d, MaskedLayer, MaskedLinear

Model = TypeVar("Model", bound=nn.Module)

_MASKED: dict[type[nn.Module], type[MaskedConv2d] | type[MaskedLinear]] = {
    nn.Conv2d: MaskedConv2d,
    nn.Linear: MaskedLinear,
}


def sparsify(
    model: Model, *, include: Sequence[str] = ("*",), exclude: Sequence[str] = ()
) -> Model:
    """Turn the Conv2d and Linear layers of a model into masked ones, in place, all weights active.

    Parameters, their names, buffers and hooks stay the same objects, so an optimizer made before
    keeps working and a dense checkpoint still loads. Norms, biases and embeddings are never masked;
    nor are subclasses of Conv2d and Linear, whose forward may do something else.

    Args:
        model: any module, which may itself be a Conv2d or Linear (its name is then "").
        include: globs over layer names (as in ``model.named_modules()``); a layer that matches one
            is masked.
        exclude: globs over layer names that stay dense, whatever ``include`` says. To leave
            depthwise convolutions dense name them here.

    Returns:
        The model.

    Raises:
        ValueError: a glob matches no Conv2d or Linear (the message lists their names), the model
            has none, or the weight of a chosen layer cannot be masked. The model is then as it was.
    """
    named = list(model.named_modules(remove_duplicate=False))  # a shared layer has several names
    layers = {name: module for name, module in named if type(module) in _MASKED}
    names = [name for name, module in named if name in layers or isinstance(module, MaskedLayer)]
    if not names:
        raise ValueError(
            f"model: expected a Conv2d or Linear layer in it, got {type(model).__name__} without"
        )
    _check_globs("include", include, names)
    _check_globs("exclude", exclude, names)
    excluded = {layer for name, layer in layers.items() if _matches(name, exclude)}
    chosen: dict[nn.Module, str] = {}
    for name, layer in layers.items():
        if _matches(name, include) and layer not in excluded:
            chosen.setdefault(layer, name)
    for layer, name in chosen.items():
        if reason := MaskedLayer.cannot_adopt(layer):
            raise ValueError(f"model: {name}: {reason}")
    for layer in chosen:
        _MASKED[type(layer)].adopt(layer)
    return model


def densify(model: Model) -> Model:
    """A copy of the model with plain torch.nn layers whose inactive weights are zeros: for export."""
    dense = copy.deepcopy(model)
    for module in dense.modules():
        if isinstance(module, MaskedLayer):
            module.shed()
    return dense


def masked_layers(model: nn.Module) -> dict[str, MaskedConv2d | MaskedLinear]:
    """The masked layers by name; of layers that share a weight, the first."""
    seen: set[int] = set()
    layers: dict[str, MaskedConv2d | MaskedLinear] = {}
    for name, module in model.named_modules():
        if isinstance(module, MaskedConv2d | MaskedLinear) and id(module.weight) not in seen:
            seen.add(id(module.weight))
            layers[name] = module
    return layers


def _matches(name: str, globs: Iterable[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)


def _check_globs(argument: str, globs: Sequence[str], names: Sequence[str]) -> None:
    if isinstance(globs, str):
        raise TypeError(
            f"{argument}: expected a sequence of globs, got one string; write ({globs!r},)"
        )
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in names):
            raise ValueError(
                f"{argument}: {glob!r} matches no layer; the layers are {', '.join(names)}"
            )
