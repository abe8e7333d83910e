"""How an operator of namespace ``granet`` comes to be: schema, checks, fake, one kernel for every device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

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
        done = quick is not None and quick(*args, **kwargs)
        if not done and not is_usual(*args, **kwargs):
            check(*args, **kwargs)
            check_data(*args, **kwargs)
        # Before the kernel: what the checks have read is still in the cache.
        for position in written:
            _increment_versions(args[position])
        return None if done else implementation(name, device)(*args, **kwargs)

    torch.library.register_fake(f"granet::{name}", fake_kernel)
    torch.library.register_kernel(f"granet::{name}", None, kernel)  # None: every device
    _kernels[name] = kernel


_kernels: dict[str, Callable[..., Any]] = {}


def without_dispatcher(name: str) -> Callable[..., Any]:
    """The operator for callers who pass hundreds of tensors at every step.

    The dispatcher takes each of them apart and puts it together again before it calls our kernel. That
    is left out where nobody is there to see the call: no compiler, no tracing, no profiler, no mode.
    """
    operator = getattr(torch.ops.granet, name).default
    kernel = _kernels[name]

    def call(*args: Any, **kwargs: Any) -> Any:
        return (operator if _is_watched() else kernel)(*args, **kwargs)

    return call


def _is_watched() -> bool:
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._autograd._profiler_enabled()
    )


def _written_arguments(name: str) -> tuple[int, ...]:
    namespace, operator = name.split("::")
    schema = getattr(getattr(torch.ops, namespace), operator).default._schema
    return tuple(i for i, argument in enumerate(schema.arguments) if argument.is_write)


def _device_type(args: tuple[Any, ...]) -> str:
    """Where the first tensor lies; the CPU if there is none."""
    return next((tensor.device.type for tensor in _tensors(args)), "cpu")


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
