"""Fixtures shared by the tests."""

import pytest
import torch

from granet_kernels import use_backend

torch.set_num_threads(1)  # the tensors are small: threads would only wait for one another


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random state and leaves no backend chosen."""
    torch.manual_seed(0)
    with use_backend("auto"):
        yield


@pytest.fixture(autouse=True, scope="session")
def settable_backend_flags():
    """Importing torch's own test tables forbids `torch.backends.cudnn.benchmark = …`; training sets it."""
    torch.backends.flags_frozen.__globals__["__allow_nonbracketed_mutation_flag"] = True
    assert not torch.backends.flags_frozen()


def pytest_collection_modifyitems(config, items):
    """Tests marked gpu need one; without it they are deselected, and the closing line counts them."""
    if not torch.cuda.is_available():
        gpu = [item for item in items if item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
