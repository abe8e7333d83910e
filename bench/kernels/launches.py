"""What the operators launch: kernels with their arguments, noted instead of run.

The operators are called on tensors of the host. Whatever reaches Triton is what a GPU would be given,
and the specialization of each argument (its type, whether 16 divides it) is Triton's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

TARGETS = (80, 90, 100)
"""Compute capabilities times ten: A100, H100 and H200, B200."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Specialization:
    """What a kernel is compiled for."""

    kernel: JITFunction[..., None]
    call: str
    """The operator's call that launched it first."""
    signature: dict[str, Any]
    """Types of the arguments, by name."""
    constants: dict[tuple[int, ...], Any]
    """Values of those that are compile-time constants, by place."""
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]
    """num_warps, enable_fp_fusion."""

    @property
    def name(self) -> str:
        """The kernel's."""
        return str(self.kernel.fn.__name__)

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for equal code."""
        parts = (self.signature, self.constants, self.attributes, self.options)
        return (self.name, *(str(sorted(part.items(), key=str)) for part in parts))

    def constant(self, name: str) -> Any:
        """A compile-time constant by name; None is one too."""
        return self.constants.get((self.kernel.arg_names.index(name),))

    def is_constant(self, name: str) -> bool:
        """Whether the argument is one, as None is."""
        return (self.kernel.arg_names.index(name),) in self.constants


@contextmanager
def noted(call: str, into: dict[tuple[object, ...], Specialization]) -> Iterator[None]:
    """Note each launch in here instead of running it."""

    def note(
        kernel: JITFunction[..., None], *args: Any, grid: Any, warmup: bool, **kwargs: Any
    ) -> None:
        made = specialize(kernel, call, args, kwargs)
        into.setdefault(made.key, made)

    original = JITFunction.run
    JITFunction.run = note
    try:
        yield
    finally:
        JITFunction.run = original


def specialize(
    kernel: JITFunction[..., None], call: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Specialization:
    """As JITFunction.run does before it compiles, without asking for a GPU."""
    backend = make_backend(GPUTarget("cuda", TARGETS[0], 32))
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = binder(*args, **kwargs)
    _, signature, constants, attributes = kernel._pack_args(
        backend, options, bound, specialization, options
    )
    return Specialization(
        kernel=kernel,
        call=call,
        signature=signature,
        constants=constants,
        attributes=attributes,
        options=options,
    )


def launches(calls: Iterable[tuple[str, Callable[[], object]]]) -> list[Specialization]:
    """The different specializations that the calls launch, in the order of their first launch."""
    found: dict[tuple[object, ...], Specialization] = {}
    for label, call in calls:
        with noted(label, found):
            call()
    return list(found.values())
