"""Where each channel of a traced network goes, and which of them can be removed.

A channel that one layer makes has a *slot*; what hands channels on (norms, activations, pooling,
depthwise convolutions) keeps their slots, additions and products make one slot of two. So a slot is all
that must be removed together. A slot is *pinned* if something reads it that is not understood.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from granet.export.channels import (
    Channels,
    Groups,
    Layer,
    absorbs,
    cut_constant,
    depthwise_constant,
    is_mixing,
    mapped_constant,
    mixed_constant,
    normed_constant,
    taps,
    varying,
)
from granet.export.graph_nodes import (
    ADDITIONS,
    CONSTANT_POOL_FUNCTIONS,
    CONSTANT_POOLS,
    ELEMENTWISE,
    ELEMENTWISE_FUNCTIONS,
    ELEMENTWISE_METHODS,
    PRODUCTS,
    are_positions,
    asks_for_batch_size,
    caller,
    keeps_channels,
    private_modules,
    shape_of,
)
from granet_kernels.nn.fuse import is_hooked, may_write


class Analysis:
    """The channels of every tensor of a graph.

    Attributes:
        of: by node; nodes that are no tensors are not in it.
        layers: convolutions, linear layers and batch norms that are understood.
        pads: calls of F.pad, with how many channels each adds before and after.
        slots: which are removed together.
        pinned: slots that must stay.
    """

    def __init__(self, root: fx.GraphModule, example: Tensor) -> None:
        """`root` is in evaluation mode and fp64, as `example`, one input; it is run once."""
        self.of: dict[fx.Node, Channels] = {}
        self.layers: list[Layer] = []
        self.pads: dict[fx.Node, tuple[int, int]] = {}
        self.slots = Groups()
        self.pinned: set[int] = set()
        self._root = root
        self._private = private_modules(root)
        self._storages, self._storage = Groups(), dict[fx.Node, int]()
        with torch.no_grad():
            ShapeProp(root).propagate(example)
            for node in root.graph.nodes:
                self._visit(node)

    # Reading the graph

    def _visit(self, node: fx.Node) -> None:
        sources = [source for source in node.all_input_nodes if source in self.of]
        found = self._understood(node) if sources else None
        if found is None and not asks_for_batch_size(node):
            self._pin(sources)
            found = self._opaque(node)
        self._storage[node] = self._storages.add()
        if may_write(self._root, node):  # whoever reads those later sees something else
            written = {self._storages.find(self._storage[source]) for source in sources}
            for other, channels in self.of.items():
                if self._storages.find(self._storage[other]) in written:
                    self.of[other] = replace(channels, constant=varying(len(channels.slots)))
        if not self._is_fresh(node):
            for source in sources:
                self._storages.join(self._storage[node], self._storage[source])
        if found is not None:
            self.of[node] = found

    def _understood(self, node: fx.Node) -> Channels | None:
        if node.op == "call_module":
            return self._module(node, self._root.get_submodule(str(node.target)))
        if node.op in ("call_function", "call_method"):
            return self._function(node)
        return None

    def _is_fresh(self, node: fx.Node) -> bool:
        """Whether the result is surely a tensor of its own, no view of another."""
        if may_write(self._root, node):
            return False
        if node.op == "call_module":
            module = self._root.get_submodule(str(node.target))
            fresh = (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.ReLU)
            return isinstance(module, fresh)
        return node.target in (*ADDITIONS, *PRODUCTS, torch.cat, F.relu, torch.relu)

    def _pin(self, sources: list[fx.Node]) -> None:
        for source in sources:
            self.pinned.update(self.of[source].slots)

    def _opaque(self, node: fx.Node) -> Channels | None:
        """Of a tensor of which nothing is known."""
        meta = node.meta.get("tensor_meta")
        shape = getattr(meta, "shape", None)
        if shape is None or len(shape) < 2:
            return None
        channels = self._made(shape[1], varying(shape[1]), 1)
        self.pinned.update(channels.slots)
        return channels

    def _made(self, count: int, constant: Tensor, dim: int) -> Channels:
        """Channels that begin here."""
        return Channels(tuple(self.slots.add() for _ in range(count)), constant, dim)

    # Modules

    def _module(self, node: fx.Node, module: nn.Module) -> Channels | None:
        source = self._only_argument(node)
        if source is None or is_hooked(module) or module.training:
            return None
        x, kind = self.of[source], type(module)
        if kind in (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.BatchNorm1d):
            return self._layer_call(node, source, module)
        if kind in ELEMENTWISE:
            return replace(x, constant=mapped_constant(module, x.constant))
        if kind in CONSTANT_POOLS and x.dim == 1:
            return x
        if isinstance(module, nn.AvgPool2d) and x.dim == 1:
            cut = module.count_include_pad and module.padding not in (0, (0, 0))
            return replace(x, constant=cut_constant(x.constant)) if cut else x
        if isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1):
            return _flattened(x, shape_of(source))
        return None

    def _layer_call(self, node: fx.Node, source: fx.Node, module: nn.Module) -> Channels | None:
        if module not in self._private:
            return None
        x, shape = self.of[source], shape_of(source)
        dim = len(shape) - 1 if type(module) is nn.Linear else 1
        if (
            x.dim != dim
        ):  # a linear layer behind something that was taken for channels in the middle
            self._pin([source])
            x = self._made(shape[dim], varying(shape[dim]), dim)
            self.pinned.update(x.slots)
        found = self._layer(x, module)
        if found is not None:
            self.layers.append(Layer(str(node.target), module, x, found))
        return found

    def _layer(self, x: Channels, module: nn.Module) -> Channels | None:
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            if module.running_mean is None:
                return None
            return replace(x, constant=normed_constant(module, x.constant))
        if is_mixing(module):
            constant = mixed_constant(module, x.constant)
            return self._made(len(constant), constant, x.dim)
        assert isinstance(module, nn.Conv2d)
        if not module.groups == module.in_channels == module.out_channels:
            return None
        return replace(x, constant=depthwise_constant(module, x.constant))

    # Functions and methods

    def _function(self, node: fx.Node) -> Channels | None:
        target = node.target
        if target in (*ADDITIONS, *PRODUCTS):
            return self._combined(node, torch.mul if target in PRODUCTS else torch.add)
        if target in (torch.cat, torch.concat):
            return self._joined(node)
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or source not in self.of:
            return None
        x, rest = self.of[source], node.args[1:]
        if target in ELEMENTWISE_FUNCTIONS or target in ELEMENTWISE_METHODS:
            return replace(x, constant=mapped_constant(caller(node), x.constant))
        if target is F.dropout and node.kwargs.get("training") is False:
            return x
        if x.dim != 1:
            return None
        if target in CONSTANT_POOL_FUNCTIONS:
            return None if node.kwargs.get("return_indices") else x
        if target in (torch.mean, "mean"):
            return x if are_positions(node, len(shape_of(source))) else None
        if target in (torch.flatten, "flatten"):
            return _flattened(x, shape_of(source)) if rest == (1,) and not node.kwargs else None
        if target in ("view", "reshape"):
            kept = len(rest) == 2 and rest[1] == -1 and shape_of(node)[0] == shape_of(source)[0]
            return _flattened(x, shape_of(source)) if kept else None
        if target is operator.getitem:
            return x if keeps_channels(rest[0]) else None
        return self._padded(node, x) if target is F.pad else None

    def _combined(self, node: fx.Node, combine: Callable[..., Tensor]) -> Channels | None:
        """Of a sum or a product: a channel of one belongs to that of the other for ever."""
        if node.kwargs or len(node.args) != 2:
            return None
        left, right = node.args
        if isinstance(left, int | float) or isinstance(right, int | float):
            [x] = [self.of.get(arg) for arg in node.args if isinstance(arg, fx.Node)]
            number = next(arg for arg in node.args if not isinstance(arg, fx.Node))
            return x and replace(x, constant=combine(x.constant, number))
        if not (left in self.of and right in self.of):
            return None
        assert isinstance(left, fx.Node)
        assert isinstance(right, fx.Node)
        x, y = self.of[left], self.of[right]
        alike = len(shape_of(left)) == len(shape_of(right)) and len(x.slots) == len(y.slots)
        if not alike or x.dim != y.dim:
            return None
        for one, other in zip(x.slots, y.slots, strict=True):
            self.slots.join(one, other)
        constant = combine(x.constant, y.constant)
        if combine is torch.mul:
            constant = constant.masked_fill((x.constant == 0) | (y.constant == 0), 0.0)
        return replace(x, constant=constant)

    def _joined(self, node: fx.Node) -> Channels | None:
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        if not isinstance(node.args[0], list | tuple):
            return None
        parts = [self.of.get(arg) for arg in node.args[0] if isinstance(arg, fx.Node)]
        known = [part for part in parts if part is not None and part.dim == dim]
        if len(known) != len(node.args[0]) or not known:
            return None
        slots = tuple(slot for part in known for slot in part.slots)
        return Channels(slots, torch.cat([part.constant for part in known]), known[0].dim)

    def _padded(self, node: fx.Node, x: Channels) -> Channels | None:
        """Of zeros around channels or positions, or both."""
        [source] = node.all_input_nodes
        of_zeros = node.kwargs.get("mode", "constant") == "constant" and not node.kwargs.get(
            "value"
        )
        if len(shape_of(source)) != 4 or len(node.args) != 2 or not of_zeros:
            return None
        if not isinstance(node.args[1], list | tuple):
            return None
        amounts = [*node.args[1], 0, 0, 0, 0, 0, 0][:6]
        if len(node.args[1]) > 6 or not all(isinstance(n, int) and n >= 0 for n in amounts):
            return None
        constant = cut_constant(x.constant) if any(amounts[:4]) else x.constant
        before, after = amounts[4], amounts[5]
        self.pads[node] = (before, after)
        first, last = (self._made(n, torch.zeros(n).double(), 1) for n in (before, after))
        constant = torch.cat([first.constant, constant, last.constant])
        return Channels((*first.slots, *x.slots, *last.slots), constant, 1)

    def _only_argument(self, node: fx.Node) -> fx.Node | None:
        [*args] = node.args
        if len(args) != 1 or node.kwargs or not isinstance(args[0], fx.Node):
            return None
        return args[0] if args[0] in self.of else None


def _flattened(x: Channels, shape: tuple[int, ...]) -> Channels | None:
    """All positions of a channel one after another, each a channel of its own."""
    if x.dim != 1:
        return None
    positions = math.prod(shape[2:])
    slots = tuple(slot for slot in x.slots for _ in range(positions))
    return Channels(slots, x.constant.repeat_interleave(positions), 1)


def removable_slots(analysis: Analysis) -> set[int]:
    """Slots that nobody misses: their readers ignore them, or can take them for constants.

    Each tensor keeps a channel.
    """
    find = analysis.slots.find
    missed = set(map(find, analysis.pinned))
    for layer in analysis.layers:
        if layer.mixes:
            ignored = ~(taps(layer.module) != 0).any(2).any(0)
            fine = ignored | absorbs(layer.module, layer.input.constant)
            pairs = zip(layer.input.slots, fine.tolist(), strict=True)
            missed |= {find(slot) for slot, is_fine in pairs if not is_fine}
    tensors = [set(map(find, channels.slots)) for channels in analysis.of.values()]
    for slots in tensors:
        if slots and not slots & missed:
            missed.add(min(slots))
    return set().union(*tensors) - missed
