"""Finding what can be computed together with a layer, in the graph that torch.fx traces.

A chain is a convolution, the batch norm behind it, the addition of a residual, and a ReLU, each the
only consumer of the one before. Whatever else could see a value in between (a second consumer,
a hook, a module in two places, a parameter that forward reads itself) ends the chain there.
"""

from __future__ import annotations

import inspect
import operator
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from granet_kernels.nn.compressed import CompressedLayer
from granet_kernels.nn.layers import MaskedConv2d, MaskedLayer

_RELU = (F.relu, F.relu_, torch.relu, torch.relu_)
_ADD = (operator.add, torch.add)
_PURE_LIBRARIES = ("torch", "_operator", "builtins", "math")


class Untraceable(Exception):
    """Why a graph of a module cannot be had, or would not tell all that its forward does."""


def trace(module: nn.Module) -> fx.Graph:
    """The graph of a module's forward; modules in it that cannot be traced are calls in the graph.

    Raises:
        Untraceable: with the reason.
    """
    if is_hooked(module):
        raise Untraceable(f"{type(module).__name__} has hooks")
    optional = [p for p in inspect.signature(module.forward).parameters.values() if _may_lack(p)]
    if optional:  # `if mask is None` would be decided once and for all
        raise Untraceable(f"forward has the optional argument {optional[0]}")
    opaque: set[nn.Module] = set()
    while True:
        tracer = LayerTracer(opaque)
        attributes = set(vars(module))
        try:
            graph = tracer.trace(module)
        except Exception as error:  # of the model's own code, given proxies: it may raise anything
            if tracer.failed is None or tracer.failed in opaque:
                raise Untraceable(f"{type(error).__name__}: {error}") from error
            opaque.add(tracer.failed)
            continue
        finally:
            constants = set(vars(module)) - attributes
            for name in constants:
                delattr(module, name)
        if constants:  # they would never be drawn or computed again
            raise Untraceable("forward makes tensors that do not depend on its input")
        for node in graph.nodes:
            if node.op == "get_attr" and isinstance(_owner(module, node.target), MaskedLayer):
                raise Untraceable(f"forward reads {node.target} itself")
        return graph


def _may_lack(parameter: inspect.Parameter) -> bool:
    variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    return variadic or parameter.default is not parameter.empty


class InPlaceProxy(fx.Proxy):
    """Records ``a += b`` as what it is: an ordinary proxy makes it ``a = a + b``, a new tensor."""


def _record_in_place(name: str) -> None:
    function = getattr(operator, name)

    def method(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    setattr(InPlaceProxy, f"__{name}__", method)


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor"):
    _record_in_place(f"i{_name}")


class LayerTracer(fx.Tracer):
    """Takes layers, and modules whose hooks must run at each call, as single calls.

    Pickles of a graph name this class.
    """

    def __init__(self, opaque: Collection[nn.Module] = ()) -> None:
        super().__init__()
        self._opaque = opaque
        self.failed: nn.Module | None = None
        """The innermost module whose forward raised; None if it was the root's own."""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return InPlaceProxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        whole = isinstance(m, MaskedLayer | CompressedLayer) or m in self._opaque or is_hooked(m)
        return whole or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed = self.failed or m
            raise


def is_hooked(module: nn.Module) -> bool:
    """Whether something watches or changes what goes into the module or comes out of it."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


@dataclass
class Chain:
    """A layer and what is fused into it."""

    layer: fx.Node
    bn: nn.BatchNorm2d | None = None
    residual: fx.Node | None = None
    relu: bool = False
    anchor: fx.Node = field(init=False)
    """Where in the graph it is computed: not before the residual."""
    nodes: list[fx.Node] = field(init=False)
    """All that it replaces, in the graph's order."""

    def __post_init__(self) -> None:
        self.anchor, self.nodes = self.layer, [self.layer]

    def replace(self, graph: fx.Graph) -> None:
        """Put one call of the layer's module in the place of all nodes."""
        kwargs = {} if self.residual is None else {"residual": self.residual}
        with graph.inserting_before(self.anchor):
            target = str(self.layer.target)
            fused = graph.call_module(target, self.layer.args, kwargs)  # type: ignore[arg-type]
        self.nodes[-1].replace_all_uses_with(fused)
        for node in reversed(self.nodes):
            graph.erase_node(node)


class Chains:
    """The chains of a traced module."""

    def __init__(self, root: nn.Module, graph: fx.Graph, uses: Mapping[nn.Module, int]) -> None:
        """``uses``: under how many names the whole model knows a module."""
        self._root, self._graph, self._uses = root, graph, uses
        self._calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
        self._read = {_owner(root, n.target) for n in graph.nodes if n.op == "get_attr"}

    def of(self, types: Collection[type[nn.Module]]) -> Iterator[tuple[nn.Module, Chain]]:
        """Layers of those types that can be changed, each with its chain; replace it before the next."""
        for node in list(self._graph.nodes):
            layer = self._module(node)
            if layer is None or type(layer) not in types or not _takes_one(node):
                continue
            private = self._uses[layer] == self._calls[node.target] == 1
            if private and layer not in self._read and not is_hooked(layer):
                yield layer, self._chain(node)

    def remove_identities(self) -> None:
        """nn.Identity hands on its argument: let those around it be neighbours."""
        for node in list(self._graph.nodes):
            if type(self._module(node)) is nn.Identity and self._is_plain_call(node):
                node.replace_all_uses_with(node.args[0])
                self._graph.erase_node(node)

    def _chain(self, node: fx.Node) -> Chain:
        chain = Chain(node)
        if user := self._next(chain, self._is_batch_norm):
            bn = self._module(user)
            assert isinstance(bn, nn.BatchNorm2d)
            chain.bn = bn
        if user := self._next(chain, self._is_addition):
            before = chain.nodes[-2]
            chain.residual = next(arg for arg in user.args if arg is not before)  # type: ignore[assignment]
            chain.anchor = user
        if self._next(chain, self._is_relu):
            chain.relu = True
        return chain

    def _next(self, chain: Chain, wanted: Callable[[fx.Node, Chain], bool]) -> fx.Node | None:
        """The only consumer of the chain so far, taken into it, if it is of the wanted kind."""
        users = list(chain.nodes[-1].users)
        if len(users) != 1 or not wanted(users[0], chain):
            return None
        chain.nodes.append(users[0])
        return users[0]

    def _is_batch_norm(self, node: fx.Node, chain: Chain) -> bool:
        bn, layer = self._module(node), self._module(chain.layer)
        return (
            type(bn) is nn.BatchNorm2d
            and self._is_plain_call(node)
            and not bn.training
            and bn.running_mean is not None
            and isinstance(layer, nn.Conv2d)
        )

    def _is_addition(self, node: fx.Node, chain: Chain) -> bool:
        """``chain + other``. In place it must be the chain that is written, for others see the other."""
        if not isinstance(self._module(chain.layer), MaskedConv2d) or node.kwargs:
            return False
        if len(node.args) != 2 or not all(isinstance(arg, fx.Node) for arg in node.args):
            return False
        if node.args[0] is node.args[1]:
            return False
        added = node.op == "call_function" and node.target in _ADD
        added |= node.op == "call_method" and node.target == "add"
        in_place = node.op == "call_function" and node.target is operator.iadd
        in_place |= node.op == "call_method" and node.target == "add_"
        ours_first = node.args[0] is chain.nodes[-1]
        return (added or (in_place and ours_first)) and self._can_wait(chain, node)

    def _can_wait(self, chain: Chain, until: fx.Node) -> bool:
        """Whether the layer sees the same input if it is computed later: nothing may write to it."""
        node = chain.layer.next
        while node is not until:
            if node not in chain.nodes and may_write(self._root, node):
                return False
            node = node.next
        return True

    def _is_relu(self, node: fx.Node, chain: Chain) -> bool:
        if not isinstance(self._module(chain.layer), MaskedLayer):
            return False
        if node.op == "call_module":
            return type(self._module(node)) is nn.ReLU and self._is_plain_call(node)
        if not set(node.kwargs) <= {"inplace"} or node.args[:1] != (chain.nodes[-1],):
            return False
        if node.op == "call_method":
            return node.target in ("relu", "relu_")
        return node.op == "call_function" and node.target in _RELU

    def _is_plain_call(self, node: fx.Node) -> bool:
        module = self._module(node)
        return module is not None and _takes_one(node) and not is_hooked(module)

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self._root.get_submodule(str(node.target)) if node.op == "call_module" else None


def _takes_one(node: fx.Node) -> bool:
    return len(node.args) == 1 and isinstance(node.args[0], fx.Node) and not node.kwargs


def may_write(root: nn.Module, node: fx.Node) -> bool:
    """Whether a node of a graph of ``root`` may change a tensor in place; what is not known may."""
    flagged = any(arg is True for arg in node.args) or "out" in node.kwargs
    if flagged or node.kwargs.get("inplace"):
        return True
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        known = type(module).__module__.startswith(("torch.nn.", "granet_kernels."))
        return not known or bool(module._modules) or is_hooked(module) or _is_in_place(module)
    if node.op == "call_method":
        return str(node.target).endswith("_")
    return node.op == "call_function" and _may_write_function(node.target)


def _is_in_place(module: nn.Module) -> bool:
    return bool(getattr(module, "inplace", False))


def _may_write_function(function: Any) -> bool:
    name = function.__name__
    library = getattr(function, "__module__", None) or "torch"  # what is built in has no module
    custom = type(function).__module__ == "torch._ops"  # torch.ops.*: only a schema would tell
    known = library.partition(".")[0] in _PURE_LIBRARIES and not custom
    operates = getattr(operator, f"__{name}__", None) is function
    return not known or name.endswith("_") or name == "setitem" or (operates and name[0] == "i")


def _owner(root: nn.Module, target: Any) -> nn.Module:
    return root.get_submodule(str(target).rpartition(".")[0])
