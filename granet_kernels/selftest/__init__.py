"""Every operator of every backend against the reference, on inputs chosen to be awkward.

One list of cases serves the test suite and ``granet check``. What an operator decides (masks,
counts, which elements are zero) must be equal bit for bit. What it computes in floating point must
lie within a bound that is derived for each element: the sum of the magnitudes that were added up,
times the number of roundings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from granet_kernels.backends import reference
from granet_kernels.ops import (
    OPERATORS,
    available_backends,
    backend_for,
    backend_status,
    use_backend,
)
from granet_kernels.ops.registry import operators_of, registered_backends
from granet_kernels.selftest import inputs, inputs_compressed, inputs_layers

GENERATORS = inputs.GENERATORS | inputs_layers.GENERATORS | inputs_compressed.GENERATORS


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Case:
    """A call of one operator."""

    operator: str
    label: str
    """What is awkward about it."""
    args: tuple[Any, ...]
    """Positional arguments on the CPU."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    roundings: int = 0
    """Additions and products behind an element of the result; 0: nothing is rounded, compare bits."""

    def arguments(self, device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Copies on a device."""
        storages: dict[int, torch.UntypedStorage] = {}
        return tuple(_to(arg, device, storages) for arg in self.args), {
            name: _to(arg, device, storages) for name, arg in self.kwargs.items()
        }

    def __str__(self) -> str:
        return f"{self.operator}-{self.label}"


def cases(operator: str) -> Iterator[Case]:
    """The cases of one operator, the same at every call."""
    for label, args, kwargs, roundings in GENERATORS[operator]():
        yield Case(operator=operator, label=label, args=args, kwargs=kwargs, roundings=roundings)


def mismatches(case: Case, backend: str, device: str) -> list[str]:
    """Run a case on a backend and on the reference: a sentence for each tensor that differs."""
    args, kwargs = case.arguments(device)
    with torch.no_grad(), use_backend(backend):
        results = _tensors(
            [getattr(torch.ops.granet, case.operator)(*args, **kwargs), args, kwargs]
        )
    args, kwargs = case.arguments(device)
    with torch.no_grad():
        expected = _tensors([getattr(reference, case.operator)(*args, **kwargs), args, kwargs])
    if not case.roundings:
        magnitudes: list[Tensor] = expected
    else:
        args, kwargs = case.arguments(device)
        args, kwargs = _in_magnitudes(args), _in_magnitudes(kwargs)
        with torch.no_grad():
            magnitudes = _tensors(
                [getattr(reference, case.operator)(*args, **kwargs), args, kwargs]
            )
    found = []
    for i, (result, want, magnitude) in enumerate(zip(results, expected, magnitudes, strict=True)):
        if difference := compare(result, want, magnitude, case.roundings):
            found.append(f"tensor {i} of results and arguments: {difference}")
    return found


def compare(result: Tensor, expected: Tensor, magnitude: Tensor, roundings: int) -> str | None:
    """None where equal: bit for bit, or within the bound; otherwise what differs."""
    if (result.shape, result.dtype, result.stride()) != (
        expected.shape,
        expected.dtype,
        expected.stride(),
    ):
        return f"expected {_form(expected)}, got {_form(result)}"
    if not roundings or not result.is_floating_point():
        wrong = _bits(result) != _bits(expected)
    else:
        stored = torch.finfo(result.dtype)
        computed = min(
            stored.eps, torch.finfo(torch.float32).eps
        )  # at least fp32 inside every kernel
        bound = roundings * computed * magnitude.double() + 2 * stored.eps * expected.double().abs()
        close = (result.double() - expected.double()).abs() <= bound + stored.tiny
        wrong = ~(close | (result == expected) | (result.isnan() & expected.isnan()))
    if not wrong.any():
        return None
    first = tuple(int(i) for i in wrong.nonzero()[0])
    values = f"expected {expected[first]}, got {result[first]}"
    return f"{int(wrong.sum())} of {wrong.numel()} elements, first at {first}: {values}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """A row of ``granet check``."""

    backend: str
    device: str
    operator: str
    cases: int
    failures: tuple[str, ...]
    runs_in: str = ""
    """What the backend's kernels ran in, where that is not the device itself."""
    note: str = ""
    """Why there was nothing to run."""


def check_all(report: Callable[[Outcome], None] = lambda outcome: None) -> list[Outcome]:
    """Every operator on every backend and device present; unavailable backends are listed with the reason."""
    outcomes = []
    for outcome in _check_all():
        report(outcome)
        outcomes.append(outcome)
    return outcomes


def devices() -> list[str]:
    """Device types of this machine."""
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def _check_all() -> Iterator[Outcome]:
    for backend in registered_backends():
        if reason := backend_status()[backend.name]:
            yield _note(backend.name, "-", "all", f"not available: {reason}")
            continue
        served = [device for device in devices() if backend.serves(device)]
        if not served:
            names = " or ".join(backend.devices or ())
            yield _note(backend.name, "-", "all", f"no {names} device here")
        for device in served:
            for operator in OPERATORS:
                if operator in operators_of(backend.name):
                    outcome = check(operator, backend.name, device)
                    yield replace(outcome, runs_in=backend.runs_in)
                else:
                    with use_backend("auto"):
                        other = backend_for(operator, device)
                    yield _note(
                        backend.name, device, operator, f"not in this backend; {other} computes it"
                    )


def check(operator: str, backend: str, device: str) -> Outcome:
    """All cases of one operator on one backend."""
    count, failures = 0, []
    for case in cases(operator):
        count += 1
        try:
            failures += [f"{case}: {mismatch}" for mismatch in mismatches(case, backend, device)]
        except Exception as error:  # a crash is a finding, and the next case may show more
            failures.append(f"{case}: {type(error).__name__}: {error}")
    return Outcome(
        backend=backend, device=device, operator=operator, cases=count, failures=tuple(failures)
    )


def backends_with(operator: str, device: str | None = None) -> list[str]:
    """The available backends that compute an operator themselves on a device: that of new tensors."""
    device = device or torch.get_default_device().type
    rows = {backend.name: backend for backend in registered_backends()}
    return [
        n for n in available_backends() if rows[n].serves(device) and operator in operators_of(n)
    ]


def _note(backend: str, device: str, operator: str, note: str) -> Outcome:
    return Outcome(
        backend=backend, device=device, operator=operator, cases=0, failures=(), note=note
    )


def _to(value: Any, device: str, storages: dict[int, torch.UntypedStorage]) -> Any:
    """A copy with the same strides; tensors that share memory here share it there."""
    if isinstance(value, list):
        return [_to(element, device, storages) for element in value]
    if not isinstance(value, Tensor):
        return value
    storage = value.untyped_storage()
    if storage.data_ptr() not in storages or not storage.nbytes():
        memory = torch.empty(0, dtype=torch.uint8).set_(storage)
        storages[storage.data_ptr()] = memory.to(device, copy=True).untyped_storage()
    view = torch.empty(0, dtype=value.dtype, device=device)
    memory_of_copy = storages[storage.data_ptr()]
    return view.set_(memory_of_copy, value.storage_offset(), value.shape, value.stride())


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [tensor for element in value for tensor in _tensors(element)]
    return []


def _in_magnitudes(value: Any, name: str = "") -> Any:
    """The same call on absolute values and with a negative rate, so that nothing cancels."""
    if isinstance(value, dict):
        return {key: _in_magnitudes(element, key) for key, element in value.items()}
    if isinstance(value, tuple):
        return tuple(_in_magnitudes(element) for element in value)
    if isinstance(value, list) and value and isinstance(value[0], Tensor):
        return [_in_magnitudes(element) for element in value]
    if isinstance(value, Tensor) and value.is_floating_point():
        return -value.abs() if name == "lr_tensor" else value.abs()
    if name in ("lr", "dampening"):  # 1 - dampening and -lr become sums
        return -abs(value)
    return False if name == "maximize" else value


def _bits(tensor: Tensor) -> Tensor:
    widths = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(widths[tensor.element_size()]) if tensor.dtype != torch.bool else tensor


def _form(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()}"
