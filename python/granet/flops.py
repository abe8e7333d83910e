"""Floating-point operations of a network, dense and sparse.

The convention of the sparse-training papers: convolutions and linear layers only, two operations
for each multiply-accumulate, active weights only; training costs three forward passes a sample.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def measure(model: nn.Module, sample_shape: Sequence[int]) -> dict[str, int]:
    """Dense forward FLOPs of each convolution and linear layer for one sample.

    One evaluation-mode forward pass of a copy whose tensors hold no data (the meta device); a
    model that needs data to run is copied in full instead. `model`, its mode, its statistics and
    the random number generators stay as they are.

    A layer called several times counts each time; one never called counts 0. Layers that share
    a weight count together under the first one's name. The input projection inside
    `nn.MultiheadAttention` counts under the attention module's own name.

    Args:
        model: any module; subclasses of the `torch.nn` layers count like their parents, masked
            layers as dense ones.
        sample_shape: shape of one input without the batch dimension, such as (3, 224, 224).

    Returns:
        Module name -> FLOPs, in the order of `model.named_modules()`.
    """
    return _counted(model, sample_shape).flops


def measure_activations(model: nn.Module, sample_shape: Sequence[int]) -> dict[str, int]:
    """Values that each convolution and linear layer reads and writes for one sample.

    Its input and its output, each once a call, weights left out; counted as by `measure`.
    """
    return _counted(model, sample_shape).activations


def _counted(model: nn.Module, sample_shape: Sequence[int]) -> _Counter:
    shape = (1, *sample_shape)
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            return _count_forward(_meta_copy(model), shape, torch.device("meta"))
        except RuntimeError:
            # It reads values in forward, or holds a tensor that is no parameter and no buffer.
            return _count_forward(copy.deepcopy(model), shape, device)


def inference_flops(dense: Mapping[str, int], active_fraction: Mapping[str, float]) -> float:
    """Forward FLOPs for one sample when only a fraction of some layers' weights is active.

    Args:
        dense: FLOPs of each layer, from `measure`.
        active_fraction: layer name -> fraction of active weights in [0, 1]; layers that are not
            named are dense.

    Raises:
        ValueError: a name is not in `dense`, or a fraction is outside [0, 1].
    """
    for name, fraction in active_fraction.items():
        if name not in dense:
            raise ValueError(
                f"active_fraction: expected layers among {', '.join(dense)}, got {name!r}"
            )
        if not 0 <= fraction <= 1:
            raise ValueError(
                f"active_fraction[{name!r}]: expected a number in [0, 1], got {fraction}"
            )
    return math.fsum(flops * active_fraction.get(name, 1.0) for name, flops in dense.items())


class TrainingFlops:
    """Training cost so far: three forward passes a sample, at the sparsity of the moment.

    Attributes:
        dense_total: what the dense network would have cost, in FLOPs.
        sparse_total: what the active weights cost, in FLOPs.
    """

    def __init__(self, dense: Mapping[str, int]) -> None:
        """`dense`: FLOPs of each layer for one sample, from `measure`."""
        self._dense = dict(dense)
        self.dense_total = 0
        self.sparse_total = 0.0

    def add(self, active_fraction: Mapping[str, float], samples: int) -> None:
        """Count `samples` samples trained with these fractions of active weights.

        Masks change at updates only, so one call an update interval is enough.

        Raises:
            ValueError: `samples` is negative, or `active_fraction` does not fit the layers.
        """
        if samples < 0:
            raise ValueError(f"samples: expected an integer of at least 0, got {samples}")
        forward = inference_flops(self._dense, active_fraction)
        self.dense_total += 3 * samples * sum(self._dense.values())
        self.sparse_total += 3 * samples * forward

    def state_dict(self) -> dict[str, Any]:
        """Both totals, and the layers' dense FLOPs to recognise the network by."""
        return {
            "dense": dict(self._dense),
            "dense_total": self.dense_total,
            "sparse_total": self.sparse_total,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`.

        Raises:
            ValueError: `state` lacks a key or belongs to another network; nothing is changed.
        """
        missing = [key for key in ("dense", "dense_total", "sparse_total") if key not in state]
        if missing:
            raise ValueError(f"state: expected the key {missing[0]!r}, got {sorted(state)}")
        if state["dense"] != self._dense:
            raise ValueError(
                "state: expected the FLOPs of this network, "
                f"{sum(self._dense.values())} over {len(self._dense)} layers, got "
                f"{sum(state['dense'].values())} over {len(state['dense'])}"
            )
        self.dense_total = int(state["dense_total"])
        self.sparse_total = float(state["sparse_total"])


def _meta_copy(model: nn.Module) -> nn.Module:
    """A deep copy that allocates no weights, with sharing between modules preserved."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(
            torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad
        )
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo)


def _count_forward(model: nn.Module, shape: tuple[int, ...], device: torch.device) -> _Counter:
    """One forward pass of `model`, a copy of our own."""
    counter = _Counter(model)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    model.eval()(torch.zeros(shape, dtype=dtype, device=device))
    return counter


class _Counter:
    """Adds up what the layers of a model do, by forward hooks."""

    def __init__(self, model: nn.Module) -> None:
        self.flops: dict[str, int] = {}
        self.activations: dict[str, int] = {}
        self._names: dict[int, str] = {}
        for name, module in model.named_modules():
            if isinstance(module, (*_CONVS, *_TRANSPOSED, nn.Linear)):
                self._names.setdefault(_weight_key(module), name)
                self.flops.setdefault(self._name(module), 0)
                self.activations.setdefault(self._name(module), 0)
                module.register_forward_hook(self._count_layer)
            elif isinstance(module, nn.MultiheadAttention):
                self.flops[name] = self.activations[name] = 0
                hook = partial(self._count_attention, name)
                module.register_forward_hook(hook, with_kwargs=True)

    def _name(self, module: nn.Module) -> str:
        return self._names[_weight_key(module)]

    def _count_layer(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        weight = module.weight
        assert isinstance(weight, Tensor)
        # An output value takes one multiply-accumulate for each weight of its channel; an input
        # value of a transposed convolution gives one to each weight of its channel.
        values = args[0] if isinstance(module, _TRANSPOSED) else output
        name = self._name(module)
        self.flops[name] += 2 * values.numel() * weight[0].numel()
        self.activations[name] += args[0].numel() + output.numel()

    def _count_attention(
        self,
        name: str,
        module: nn.MultiheadAttention,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: tuple[Tensor, Tensor | None],
    ) -> None:
        # The module applies its projection weights itself: its out_proj layer is never called.
        named = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        values = sum(named[key].numel() for key in ("query", "key", "value"))
        self.flops[name] += 2 * module.embed_dim * values
        self.activations[name] += 2 * values
        self.flops[self._name(module.out_proj)] += 2 * module.embed_dim * output[0].numel()
        self.activations[self._name(module.out_proj)] += 2 * output[0].numel()


def _weight_key(module: nn.Module) -> int:
    """The same for layers that share a weight. A parametrized weight is a new tensor each time."""
    weight = module._parameters.get("weight")
    return id(module if weight is None else weight)
