"""Fixtures shared by the tests."""

import importlib.util
import os

import pytest
import torch

from granet_kernels import use_backend

torch.set_num_threads(1)  # the tensors are small: threads would only wait for one another
if "GRANET_TEST_DEVICE" in os.environ:  # where the operators' tests make their tensors
    torch.set_default_device(os.environ["GRANET_TEST_DEVICE"])
if os.environ.get("TRITON_INTERPRET") == "1":
    import tests.quick_interpreter  # noqa: F401


# A machine with a GPU need not have the extras: what cannot be imported there is left out, and said.
PROGRAM = ("pydantic", "yaml")
PAGE = ("jinja2", "matplotlib", "PIL")
NEEDS = {
    "test_compress_networks.py": ("torchvision",),
    "test_data.py": ("torchvision", "PIL", "sklearn"),
    "test_data_formats.py": ("torchvision", "PIL"),
    "test_data_imagefolder.py": ("torchvision", "PIL"),
    "test_models.py": ("torchvision",),
    "test_flops.py": ("torchvision",),
    "test_nn_like_torch.py": ("expecttest",),
    "test_optim_like_torch.py": ("expecttest",),
    "test_resnet50.py": ("torchvision",),
    "test_swap.py": ("torchvision",),
    "test_train.py": (*PROGRAM, "sklearn", "torchvision"),
    "test_demo.py": (*PROGRAM, "sklearn"),
    "test_cli.py": (*PROGRAM, "sklearn"),
    "test_docs.py": (*PROGRAM, "markdown_it", "sklearn"),
    "test_site.py": (*PROGRAM, "latex2mathml", "markdown_it", "material", "mkdocstrings"),
    "test_export.py": (*PROGRAM, "sklearn"),
    "test_inspect.py": (*PROGRAM, "sklearn"),
    "test_methods.py": (*PROGRAM, "sklearn"),
    "test_monitor.py": (*PROGRAM, "sklearn"),
    "test_plan.py": (*PROGRAM, "sklearn"),
    "test_plasticity.py": (*PROGRAM, "sklearn"),
    "test_sweep.py": (*PROGRAM, "sklearn"),
    "test_config.py": PROGRAM,
    "test_checkpoint.py": PROGRAM,
    "test_recipes.py": PROGRAM,
    "test_machine.py": (*PROGRAM, "sklearn"),
    "test_report.py": PROGRAM,
    "test_report_browser.py": (*PROGRAM, *PAGE, "sklearn"),
    "test_report_charts.py": PAGE,
    "test_report_page.py": (*PROGRAM, *PAGE, "sklearn"),
    "test_packaging.py": ("cmake",),
    "test_cuda_simt.py": ("pybind11",),
    "test_triton.py": ("triton",),
}
missing = {
    file: absent
    for file, names in NEEDS.items()
    if (absent := [name for name in names if importlib.util.find_spec(name) is None])
}
collect_ignore = list(missing)


def pytest_report_header():
    """One line for each file that is left out."""
    return [f"left out: {file} (needs {', '.join(absent)})" for file, absent in missing.items()]


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
    """Tests marked gpu need one, and GRANET_TEST_BACKENDS names the backends whose tests are wanted.

    The others are deselected, and the closing line counts them.
    """
    wanted = os.environ.get("GRANET_TEST_BACKENDS", "").split()

    def chosen(item):
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            return False
        backend = item.callspec.params.get("backend") if hasattr(item, "callspec") else None
        return not wanted or backend in wanted

    config.hook.pytest_deselected(items=[item for item in items if not chosen(item)])
    items[:] = [item for item in items if chosen(item)]
