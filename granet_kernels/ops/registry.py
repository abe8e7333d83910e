"""Which backend computes an operator.

A backend is a module with one function for each operator it has, named after it. The public
operators (namespace ``granet``) check their arguments and then ask :func:`implementation` for the
function. Backends are listed from fastest to slowest and imported on first use; one that cannot be
imported says why through the ``ImportError`` it raises.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType, TracebackType
from typing import Any


class BackendUnavailableError(RuntimeError):
    """The backend that was asked for cannot run here; the message says why and what to install."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Backend:
    """A row of the registry."""

    name: str
    """What :func:`use_backend` and ``GRANET_BACKEND`` call it."""
    module: str
    """Imported on first use; its functions are named after the operators."""
    devices: tuple[str, ...] | None
    """Device types it computes on; None: any."""
    runs_in: str = ""
    """What its kernels run in, where that is not the device itself."""

    def serves(self, device_type: str) -> bool:
        return self.devices is None or device_type in self.devices


_backends: dict[str, Backend] = {}  # in order of preference
_loaded: dict[str, ModuleType | str] = {}  # the module, or why there is none
# By (operator, device type) under _selected.
_resolved: dict[tuple[str, str], Callable[..., Any]] = {}
_quick: dict[tuple[str, str], Callable[..., Any] | None] = {}
_warned: set[str] = set()
_selected: str | None = None  # None: the first available backend that serves the device


def register_backend(backend: Backend) -> None:
    """Add a backend behind those registered before it; a known name is replaced in its place."""
    _backends[backend.name] = backend
    _loaded.pop(backend.name, None)
    _resolved.clear()
    _quick.clear()


def registered_backends() -> tuple[Backend, ...]:
    """All known backends, available or not, the preferred ones first."""
    return tuple(_backends.values())


def backend_status() -> dict[str, str | None]:
    """For every known backend None where it can run, or a sentence on why not and what to install."""
    return {name: _why_unavailable(name) for name in _backends}


def available_backends() -> tuple[str, ...]:
    """Names of the backends that can run on this machine, the preferred ones first."""
    return tuple(name for name, reason in backend_status().items() if reason is None)


def operators_of(name: str) -> frozenset[str]:
    """The operators that an available backend computes itself."""
    module = _load(name)
    return frozenset() if isinstance(module, str) else frozenset(module.__all__)


class use_backend:
    """Choose the backend of every operator, from now on or for a ``with`` block.

    The choice holds for the devices that the backend serves; tensors on others keep their default.
    It is one choice for the whole process, because autograd runs backward passes in threads of its
    own.

    Args:
        name: one of :func:`available_backends`, or ``"auto"`` for the default of each device.

    Raises:
        ValueError: the name is unknown.
        BackendUnavailableError: the backend cannot run here.
    """

    def __init__(self, name: str) -> None:
        selected = _validated(name)
        self._previous = _selected
        _select(selected)

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _select(self._previous)


def selected_backend() -> str:
    """The name given to :func:`use_backend` or ``GRANET_BACKEND``, or ``"auto"``."""
    return _selected or "auto"


def select_from_environment() -> None:
    """Honour ``GRANET_BACKEND``."""
    _select(_validated(os.environ.get("GRANET_BACKEND") or "auto"))


def implementation(operator: str, device_type: str) -> Callable[..., Any]:
    """The function that computes ``operator`` on tensors of ``device_type``."""
    key = (operator, device_type)
    if key not in _resolved:
        _resolved[key] = getattr(_load(backend_for(operator, device_type)), operator)
    return _resolved[key]


def quick_implementation(operator: str, device_type: str) -> Callable[..., Any] | None:
    """``try_<operator>`` of the same backend, if it has that.

    It judges the arguments itself and computes if they are plainly right, else it returns
    ``NotImplemented`` and has changed nothing. Of an operator that takes hundreds of tensors compiled
    code judges and computes in one crossing; of a layer it is enough that an earlier call was alike.
    """
    key = (operator, device_type)
    if key not in _quick:
        module = _load(backend_for(operator, device_type))
        _quick[key] = getattr(module, f"try_{operator}", None)
    return _quick[key]


def backend_for(operator: str, device_type: str) -> str:
    """The name of the backend that computes ``operator`` on tensors of ``device_type``.

    The chosen backend where it serves the device and has the operator, else the most preferred one
    that does. Whoever gets a slower one than was chosen, or than the device should have, is told so
    once.
    """
    candidates = [backend for backend in _backends.values() if backend.serves(device_type)]
    candidates.sort(key=lambda backend: backend.name != _selected)  # stable: the chosen one first
    passed_over: list[str] = []
    for backend in candidates:
        if reason := _why_unavailable(backend.name):
            passed_over.append(f"{backend.name} is not available ({reason})")
        elif operator in operators_of(backend.name):
            _warn_once(passed_over, f"{backend.name} computes on {device_type} tensors")
            return backend.name
        elif backend.name == _selected:
            passed_over.append(f"{backend.name} has no {operator}")
    raise BackendUnavailableError(
        f"{operator}: no backend for {device_type} tensors: {'; '.join(passed_over) or 'none has it'}"
    )


def _select(name: str | None) -> None:
    global _selected
    _selected = name
    _resolved.clear()
    _quick.clear()


def _validated(name: str) -> str | None:
    if name == "auto":
        return None
    if name not in _backends:
        raise ValueError(f"backend: expected one of {['auto', *_backends]}, got {name!r}")
    if reason := _why_unavailable(name):
        raise BackendUnavailableError(f"backend {name!r} is not available: {reason}")
    return name


def _why_unavailable(name: str) -> str | None:
    loaded = _load(name)
    return loaded if isinstance(loaded, str) else None


def _load(name: str) -> ModuleType | str:
    if name not in _loaded:
        try:
            _loaded[name] = importlib.import_module(_backends[name].module)
        except ImportError as error:
            _loaded[name] = str(error)
    return _loaded[name]


def _warn_once(passed_over: list[str], instead: str) -> None:
    for reason in passed_over:
        if reason not in _warned:
            _warned.add(reason)
            warnings.warn(f"granet_kernels: {reason}; {instead}", stacklevel=2)
