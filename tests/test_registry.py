"""Choosing a backend."""

import subprocess
import sys
import warnings

import pytest
import torch

import granet_kernels
from granet_kernels import Backend, BackendUnavailableError, available_backends, use_backend
from granet_kernels.ops import backend_for, registry, selected_backend


@pytest.fixture
def fast_backend():
    """A preferred CPU backend that cannot be imported."""
    known = dict(registry._backends)
    registry._backends.clear()
    registry.register_backend(Backend(name="fast", module="not.installed", devices=("cpu",)))
    registry._backends.update(known)
    registry._warned.clear()
    yield
    registry._backends.clear()
    registry._backends.update(known)
    registry._loaded.pop("fast", None)
    registry._resolved.clear()


def test_reference_is_always_there():
    assert "reference" in available_backends()
    assert backend_for("prune_", "meta-like-device") == "reference"


def test_setter_and_context_manager():
    use_backend("reference")
    assert selected_backend() == "reference"
    with use_backend("auto"):
        assert selected_backend() == "auto"
    assert selected_backend() == "reference"


def test_context_manager_restores_after_an_error():
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert selected_backend() == "auto"


def test_unknown_backend_lists_the_known():
    with pytest.raises(
        ValueError, match=r"backend: expected one of .*'reference'.*, got 'fastest'"
    ):
        use_backend("fastest")
    assert selected_backend() == "auto"


def test_unavailable_backend_says_why(fast_backend):
    with pytest.raises(
        BackendUnavailableError, match=r"'fast' is not available: No module named 'not'"
    ):
        use_backend("fast")


def test_missing_default_is_reported_once(fast_backend):
    with pytest.warns(UserWarning, match=r"fast is not available .*computes on cpu tensors"):
        backend_for("prune_", "cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backend_for("drop_regrow_", "cpu")


def test_chosen_backend_without_the_operator_is_reported(monkeypatch):
    if "cpp" not in available_backends():
        pytest.fail("the compiled extension is not installed")
    from granet_kernels.backends import cpp

    others = [name for name in cpp.__all__ if name != "masked_linear"]
    monkeypatch.setattr(cpp, "__all__", others)
    monkeypatch.setattr(registry, "_resolved", {})
    registry._warned.clear()
    with (
        use_backend("cpp"),
        pytest.warns(UserWarning, match=r"cpp has no masked_linear; reference computes"),
    ):
        assert backend_for("masked_linear", "cpu") == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backend_for("masked_linear", "cpu") == "reference"  # nobody asked for cpp


def test_choice_holds_for_the_devices_it_serves(fast_backend):
    with use_backend("reference"):
        assert backend_for("pack_mask", "cuda") == "reference"


def test_environment_chooses():
    code = "import granet_kernels.ops as o; print(o.selected_backend())"
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=_environment("reference"),
        check=True,
    )
    assert run.stdout.strip() == "reference"
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=_environment("nonsense"),
        check=False,
    )
    assert "backend: expected one of" in run.stderr


def _environment(backend):
    import os

    return os.environ | {"GRANET_BACKEND": backend}


def test_backward_uses_the_chosen_backend_too(monkeypatch):
    """Autograd may run backward in another thread: the choice belongs to the process."""
    seen = []
    original = registry.backend_for
    monkeypatch.setattr(registry, "backend_for", lambda *key: seen.append(key) or original(*key))
    layer = granet_kernels.MaskedLinear(3, 2)
    with use_backend("reference"):
        layer(torch.ones(1, 3)).sum().backward()
    assert ("masked_linear_backward", "cpu") in seen


def test_build_info():
    info = granet_kernels.build_info()
    assert info["torch"] == torch.__version__
    assert info["backends"]["reference"] == "available"
