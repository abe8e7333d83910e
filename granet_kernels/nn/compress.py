"""From a trained sparse model to one that holds only non-zeros."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from granet_kernels.nn.compressed import CompressedConv2d, CompressedLinear, fold_batch_norm
from granet_kernels.nn.fuse import Chain, Chains, Untraceable, trace
from granet_kernels.nn.layers import MaskedConv2d, MaskedLinear

_FUSED = (MaskedConv2d, MaskedLinear, nn.Conv2d)


def compress(
    model: nn.Module, *, fuse: bool = True, example_input: Tensor | tuple[Any, ...] | None = None
) -> nn.Module:
    """A copy of a model for inference, in which masked layers hold only their non-zeros.

    Each MaskedConv2d becomes a :class:`CompressedConv2d`, each MaskedLinear a
    :class:`CompressedLinear` (subclasses of them stay as they are). A batch norm behind
    a convolution is folded into it, a ReLU is computed with it, and so is the addition of a
    residual. The result equals ``model.eval()`` but for the rounding of the folded weights.

    What belongs together is found by tracing forward with torch.fx, and the result is a
    :class:`torch.fx.GraphModule`: it has the model's parts, their names and its forward, not its
    class and other methods. What forward reads of Python (attributes, flags, ``isinstance``) is
    read once, now. A model that cannot be traced, because forward decides by values or has optional
    arguments, is copied with its class; in it ``nn.Sequential`` parts are fused, which can then
    only be called as a whole; a warning says so.

    The result is in eval mode, its parameters require no gradient, and a call whose input requires
    one is an error: there is no backward pass. Its ``state_dict`` can be loaded into a compressed
    model of the same architecture, whatever the masks there.

    Args:
        model: with masked layers; not changed.
        fuse: False leaves batch norms and ReLUs alone, and the class of the model: nothing is
            traced, only layers are replaced.
        example_input: an argument for forward, or a tuple of them: the result is tried on it.

    Raises:
        ValueError: the model has no masked layer.
        RuntimeError: on ``example_input`` the result differs from the model.
    """
    if not any(_is_masked(module) for module in model.modules()):
        raise ValueError(
            f"model: expected a MaskedConv2d or MaskedLinear in it, got {type(model).__name__} without"
        )
    twin = copy.deepcopy(model).eval().requires_grad_(False)
    if example_input is None:
        return _Compressor(twin, fuse).compress_root()
    args = example_input if isinstance(example_input, tuple) else (example_input,)
    with torch.no_grad():
        expected = twin(*args)
        result = _Compressor(twin, fuse).compress_root()
        _check_close(result(*args), expected)
    return result


class _Compressor:
    """Replaces the modules of a model that is ours to change."""

    def __init__(self, root: nn.Module, fuse: bool) -> None:
        self._root, self._fuse = root, fuse
        self._uses = Counter(module for _, module in root.named_modules(remove_duplicate=False))
        self._done: dict[nn.Module, nn.Module] = {}  # a module in two places stays one

    def compress_root(self) -> nn.Module:
        return self._compressed(self._root).eval()

    def _compressed(self, module: nn.Module) -> nn.Module:
        """What takes the place of a module."""
        if module not in self._done:
            if _is_masked(module):
                self._done[module] = _without_neighbours(module)
            else:
                self._done[module] = self._traced(module) or self._in_place(module)
        return self._done[module]

    def _in_place(self, module: nn.Module) -> nn.Module:
        for name, child in module._modules.items():
            if child is not None:
                module._modules[name] = self._compressed(child)
        return module

    def _traced(self, module: nn.Module) -> nn.Module | None:
        """The model, or an nn.Sequential of one that cannot be traced, as a fused graph."""
        is_root = module is self._root
        if not self._fuse or not module._modules or not (is_root or type(module) is nn.Sequential):
            return None
        try:
            graph = trace(module)
        except Untraceable as reason:
            if is_root:
                _warn_untraced(module, reason)
            return None
        chains = Chains(module, graph, self._uses)
        chains.remove_identities()
        for layer, chain in chains.of(_FUSED):
            if fused := _with_neighbours(layer, chain):
                module.set_submodule(str(chain.layer.target), fused)
                self._done[fused] = fused
                chain.replace(graph)
        for node in graph.nodes:
            if node.op == "call_module":
                target = str(node.target)
                module.set_submodule(target, self._compressed(module.get_submodule(target)))
        name = f"Compressed{type(module).__name__}" if is_root else "FusedSequential"
        return fx.GraphModule(module, graph, class_name=name)


def _is_masked(module: nn.Module) -> bool:
    """Exactly the layers of this package: the forward of a subclass may do something else."""
    return type(module) in (MaskedConv2d, MaskedLinear) and "forward" not in vars(module)


def _without_neighbours(layer: nn.Module) -> nn.Module:
    if isinstance(layer, MaskedConv2d):
        return CompressedConv2d.from_masked(layer)
    assert isinstance(layer, MaskedLinear)
    return CompressedLinear.from_masked(layer)


def _with_neighbours(layer: nn.Module, chain: Chain) -> nn.Module | None:
    """A layer that computes the chain; None where there is nothing to fuse."""
    if isinstance(layer, MaskedConv2d):
        residual = chain.residual is not None
        return CompressedConv2d.from_masked(layer, chain.bn, chain.relu, residual=residual)
    if isinstance(layer, MaskedLinear):
        return CompressedLinear.from_masked(layer, chain.relu)
    assert isinstance(layer, nn.Conv2d)
    if chain.bn is None:
        return None
    weight, bias = fold_batch_norm(layer.weight, layer.bias, chain.bn)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


def _warn_untraced(model: nn.Module, reason: Untraceable) -> None:
    warnings.warn(
        f"compress: {type(model).__name__} cannot be traced: {reason}. Batch norms and ReLUs are "
        "fused inside nn.Sequential only, which can then only be called as a whole; fuse=False "
        "leaves every module on its own",
        stacklevel=6,
    )


def _check_close(result: Any, expected: Any) -> None:
    """Tensor by tensor, to a thousandth of the largest element (bf16 and fp16: to a twentieth)."""
    pairs = list(zip(tree_leaves(result), tree_leaves(expected), strict=True))
    for ours, theirs in pairs:
        if not isinstance(theirs, Tensor) or not theirs.is_floating_point() or not theirs.numel():
            continue
        share = 1e-3 if theirs.element_size() > 2 else 5e-2
        limit = share * float(theirs.abs().max())
        difference = float((ours - theirs).abs().max())
        if not difference <= limit:
            raise RuntimeError(
                f"example_input: the compressed model's output differs by {difference:.3g}, more "
                f"than {limit:.3g}; forward may depend on what tracing does not see: try fuse=False"
            )
