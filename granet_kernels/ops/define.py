"""How an operator of namespace ``granet`` comes to be: schema, checks, fake, one kernel for every device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._C import _get_tracing_state, _len_torch_dispatch_stack
from torch._C._autograd import _profiler_enabled
from torch._C._functorch import peek_interpreter_stack
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.compiler import is_compiling

from granet_kernels.ops.registry import implementation, quick_implementation


def define(
    name: str,
    schema: str,
    *,
    check: Callable[..., None],
    fake: Callable[..., Any] = lambda *args, **kwargs: None,
    check_data: Callable[..., None] = lambda *args, **kwargs: None,
    is_usual: Callable[..., bool] = lambda *args, **kwargs: False,
) -> None:
    """Register ``granet::<name>``.

    A dispatch key holds one kernel, and backends must be switchable, so the public operator has a
    single kernel for all devices: it checks all arguments before anything is written and then asks
    the registry who computes.

    Args:
        name: of the operator and of the function in each backend.
        schema: arguments and results, as torch.library takes them.
        check: reads the arguments' metadata; raises ValueError.
        fake: allocates the results without computing them; None for operators that write in place.
        check_data: what only real tensors can tell, such as overlapping memory.
        is_usual: a quick judge of real tensors; True only where both checks would pass.
    """
    torch.library.define(f"granet::{name}", schema)
    written = _written_arguments(f"granet::{name}")

    def fake_kernel(*args: Any, **kwargs: Any) -> Any:
        check(*args, **kwargs)
        return fake(*args, **kwargs)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        device = _device_type(args)
        quick = quick_implementation(name, device)
        result = NotImplemented if quick is None else quick(*args, **kwargs)
        if result is NotImplemented and not is_usual(*args, **kwargs):
            check(*args, **kwargs)
            check_data(*args, **kwargs)
        # Before the kernel: what the checks have read is still in the cache.
        for position, argument in written:
            tensors = args[position] if position < len(args) else kwargs.get(argument)
            if tensors:
                _increment_versions(tensors)
        if result is NotImplemented:
            return implementation(name, device)(*args, **kwargs)
        return result

    torch.library.register_fake(f"granet::{name}", fake_kernel)
    torch.library.register_kernel(f"granet::{name}", None, kernel)  # None: every device
    _kernels[name] = kernel


_kernels: dict[str, Callable[..., Any]] = {}


def compile_as(name: str, composition: Callable[..., Any]) -> None:
    """Let compilers take an operator for a function of others that computes the same.

    For one that writes its arguments and returns a list: torch cannot functionalize that in one piece.
    """

    @getattr(torch.ops.granet, name).default.py_impl(FunctionalTensorMode)  # type: ignore[untyped-decorator]
    def functionalized(mode: FunctionalTensorMode, *args: Any, **kwargs: Any) -> Any:
        with mode:  # a mode is left while it handles an operator
            return composition(*args, **kwargs)


def without_dispatcher(name: str) -> Callable[..., Any]:
    """The operator for callers who pass hundreds of tensors, or call it in every layer.

    The dispatcher takes each argument apart and puts it together again before it calls our kernel: a
    third of the 110 us of a small layer. It is left out where nobody is there to see the call.
    """
    operator = getattr(torch.ops.granet, name).default
    kernel = _kernels[name]

    def call(*args: Any, **kwargs: Any) -> Any:
        return (operator if is_watched(args) else kernel)(*args, **kwargs)

    return call


def kernel_of(name: str) -> Callable[..., Any]:
    """The operator without the dispatcher, for callers who have asked :func:`is_watched` themselves."""
    return _kernels[name]


def is_watched(args: tuple[Any, ...]) -> bool:
    """Whether someone has to see a call: a compiler, tracing, a profiler, a mode, a subclass of tensors."""
    return (
        is_compiling()  # first: a compiler takes it for a constant, and sees nothing of the rest
        or not _PLAIN.issuperset(map(type, args))
        or _len_torch_dispatch_stack() > 0
        or peek_interpreter_stack() is not None
        or _profiler_enabled()
        or _get_tracing_state() is not None
    )


_PLAIN = frozenset(
    {torch.Tensor, torch.nn.Parameter, list, tuple, int, bool, str, torch.dtype, type(None)}
)
"""Types of arguments for which nobody has overridden operators."""


def _written_arguments(name: str) -> tuple[tuple[int, str], ...]:
    """Places and names; one that is passed by name may be left out."""
    namespace, operator = name.split("::")
    schema = getattr(getattr(torch.ops, namespace), operator).default._schema
    return tuple((i, arg.name) for i, arg in enumerate(schema.arguments) if arg.is_write)


def _device_type(args: tuple[Any, ...]) -> str:
    """Where the first tensor lies; the CPU if there is none."""
    first = args[0] if args and isinstance(args[0], Tensor) else next(_tensors(args), None)
    return "cpu" if first is None or first.is_cpu else first.device.type


def _tensors(args: Any) -> Iterator[Tensor]:
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, list | tuple):
            yield from _tensors(arg)


def _increment_versions(tensors: list[Tensor]) -> None:
    """Kernels write through raw pointers, which autograd's version counters do not see."""
    try:
        torch.autograd.graph.increment_version(tensors)
    except RuntimeError:  # inference tensors have none; asking each of hundreds first takes longer
        torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])
