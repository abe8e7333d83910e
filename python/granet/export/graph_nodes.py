"""Questions about the nodes of a traced graph, and which operations are understood."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

ELEMENTWISE = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Tanh,
    nn.Sigmoid, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Identity, nn.Dropout, nn.Dropout2d,
)  # fmt: skip
ELEMENTWISE_FUNCTIONS = (
    F.relu, F.relu_, F.relu6, F.leaky_relu, F.elu, F.gelu, F.silu, F.mish, F.hardswish, F.hardsigmoid,
    F.sigmoid, F.tanh, torch.relu, torch.relu_, torch.sigmoid, torch.tanh,
)  # fmt: skip
ELEMENTWISE_METHODS = (
    "relu",
    "relu_",
    "sigmoid",
    "sigmoid_",
    "tanh",
    "tanh_",
    "contiguous",
    "clone",
)
ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
PRODUCTS = (operator.mul, operator.imul, torch.mul, "mul", "mul_")
CONSTANT_POOLS = (nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
"""That make a constant of a constant, whatever their padding."""
CONSTANT_POOL_FUNCTIONS = (F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.max_pool2d)


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Of the tensor that the shape propagation has seen."""
    return tuple(node.meta["tensor_meta"].shape)


def private_modules(root: fx.GraphModule) -> set[nn.Module]:
    """Modules that are called once and share neither name nor parameter with another."""
    names = Counter(module for _, module in root.named_modules(remove_duplicate=False))
    calls = Counter(node.target for node in root.graph.nodes if node.op == "call_module")
    shares = Counter(p for module in names for p in module._parameters.values() if p is not None)
    read = {str(n.target).rpartition(".")[0] for n in root.graph.nodes if n.op == "get_attr"}
    return {
        module
        for name, module in root.named_modules()
        if names[module] == calls[name] == 1
        and name not in read
        and all(shares[p] == 1 for p in module._parameters.values() if p is not None)
    }


def asks_for_batch_size(node: fx.Node) -> bool:
    """``x.size(0)``, ``x.size()[0]`` or ``x.shape[0]``, which no channel has a part in."""
    if node.target == "size" and node.args[1:] == (0,):
        return True
    whole = node.target == "size" or (node.target is getattr and node.args[1:] == ("shape",))
    return whole and all(
        user.target is operator.getitem and user.args[1] == 0 for user in node.users
    )


def caller(node: fx.Node) -> Callable[[Tensor], Tensor]:
    """What a node computes of its first argument."""
    rest, kwargs = node.args[1:], node.kwargs
    if node.op == "call_method":
        return lambda x: getattr(x, str(node.target))(*rest, **kwargs)
    assert callable(node.target)
    function: Callable[..., Any] = node.target
    return lambda x: function(x, *rest, **kwargs)


def are_positions(node: fx.Node, dims: int) -> bool:
    """Whether a mean is taken over dimensions behind the channels alone."""
    over: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    over = (over,) if isinstance(over, int) else over
    return isinstance(over, list | tuple) and all(d % dims >= 2 for d in over) and bool(over)


def keeps_channels(index: Any) -> bool:
    """Whether ``x[index]`` takes some positions of all channels of all samples."""
    everything = slice(None)
    return (
        isinstance(index, tuple)
        and index[:2] == (everything, everything)
        and all(isinstance(part, slice) for part in index)
    )
