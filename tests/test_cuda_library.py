"""Which machines the CUDA extension is loaded on."""

import pytest
import torch

from granet_kernels.backends.cuda import library

pytest.importorskip("granet_kernels._native")


@pytest.fixture
def driver(monkeypatch):
    """Pretends a GPU, with a driver for that version of CUDA."""

    def pretend(version):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: version, raising=False)
        built = {"cuda_toolkit": "13.0"}
        monkeypatch.setattr("granet_kernels._native.build_info", lambda: built)

    return pretend


def test_an_older_driver_is_named(driver):
    driver(12080)
    with pytest.raises(
        ImportError, match=r"built with CUDA 13\.0, and the driver is one for 12\.8"
    ):
        library._check_driver()


@pytest.mark.parametrize("version", [13000, 13020, 14000])
def test_others_will_do(driver, version):
    driver(version)
    library._check_driver()
