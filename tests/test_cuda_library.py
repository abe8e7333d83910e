"""Which machines the CUDA extension is loaded on."""

import ctypes

import pytest
import torch

from granet_kernels.backends.cuda import library

pytest.importorskip("granet_kernels._native")


class Driver:
    """As much of libcuda as is asked for its version."""

    def __init__(self, version, status=0):
        self.version, self.status = version, status

    def cuDriverGetVersion(self, pointer):
        ctypes.cast(pointer, ctypes.POINTER(ctypes.c_int))[0] = self.version
        return self.status


@pytest.fixture
def driver(monkeypatch):
    """A machine that has it."""

    def install(found):
        def load(name):
            assert name == "libcuda.so.1"
            if found is None:
                raise OSError("libcuda.so.1: cannot open shared object file")
            return found

        monkeypatch.setattr(library.ctypes, "CDLL", load)
        built = {"cuda_toolkit": "13.0"}
        monkeypatch.setattr("granet_kernels._native.build_info", lambda: built)

    return install


def test_an_older_driver_is_named(driver):
    driver(Driver(12080))
    with pytest.raises(
        ImportError, match=r"built with CUDA 13\.0, and the driver is one for 12\.8"
    ):
        library._check_driver()


@pytest.mark.parametrize(
    "found",
    [Driver(13000), Driver(13020), Driver(14000), Driver(0, status=3), None],
    ids=["same", "minor", "major", "fails", "none"],
)
def test_others_will_do(driver, found):
    """No driver at all too: there are no tensors then that would need one."""
    driver(found)
    library._check_driver()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_driver_tells_its_version():
    assert library._driver_version() >= 1000 * int(torch.version.cuda.split(".")[0])
