"""Weights and momenta in large pages: nobody may notice, but the system, which counts them."""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from granet_kernels import MaskedLinear, MaskedSGD
from granet_kernels import optim as optim_module
from granet_kernels.large_pages import gather_in_large_pages
from granet_kernels.selftest import backends_with

ROOT = Path(__file__).parents[1]
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
ASKED_FOR = {"GRANET_BACKEND": "cpp", "GRANET_LARGE_PAGES": "1"}


def _come_when_asked_for():
    """With `always` all memory would be in large pages, asked for or not."""
    release = tuple(map(int, re.findall(r"\d+", platform.release())[:2]))
    is_new = platform.system() == "Linux" and release >= (6, 1)
    return is_new and SETTING.exists() and "[madvise]" in SETTING.read_text()


pytestmark = pytest.mark.skipif(
    "cpp" not in backends_with("masked_sgd_"), reason="the cpp backend is not built"
)
needs_large_pages = pytest.mark.skipif(
    not _come_when_asked_for(), reason="needs Linux 6.1 with transparent huge pages on request"
)


def share_in_large_pages(tensors):
    """Of the bytes of tensors; of the mappings that hold them all is counted."""
    spans = [(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in tensors]
    found = 0
    overlaps = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if mapping := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            start, end = (int(address, 16) for address in mapping.groups())
            overlaps = any(start < last and first < end for first, last in spans)
        elif overlaps and (size := re.match(r"AnonHugePages: +(\d+) kB", line)):
            found += int(size[1]) * 1024
    return found / sum(tensor.nbytes for tensor in tensors)


def stepped():
    """A layer of 64 MB after steps of MaskedSGD, and its momentum."""
    torch.manual_seed(0)
    layer = MaskedLinear(4096, 4096, bias=False)
    layer.mask = torch.rand(layer.weight.shape) < 0.1
    layer.weight.grad = torch.randn(layer.weight.shape)
    optimizer = MaskedSGD(layer.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        optimizer.step()
    return [layer.weight, optimizer.momentum_of(layer.weight)]


def share_of_a_process(setting):
    """After steps in a process without other tests' large pages, whose mappings may become one with these."""
    script = (
        "from tests.test_large_pages import share_in_large_pages, stepped\n"
        "print(share_in_large_pages(stepped()))"
    )
    return float(
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, **ASKED_FOR, **setting},
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    )


@needs_large_pages
def test_a_steps_weights_and_momenta_lie_in_large_pages():
    assert share_of_a_process({}) > 0.75  # the ends do not, and a page may be busy


@needs_large_pages
@pytest.mark.parametrize("setting", [{"GRANET_BACKEND": "reference"}, {"GRANET_LARGE_PAGES": "0"}])
def test_memory_is_left_alone(setting):
    assert share_of_a_process(setting) == 0


def test_addresses_and_contents_stay():
    tensors = [torch.randn(2000, 777), torch.randn(3, 5), torch.randn(512, 512, 3, 3).double()]
    tensors.append(torch.randn(64, 300, 9, 7).to(memory_format=torch.channels_last))
    tensors.append(torch.nn.Parameter(torch.randn(1 << 20)))
    tensors.append(torch.randn(2000, 3000)[:, ::3])
    before = [(tensor.data_ptr(), tensor.detach().clone(), tensor._version) for tensor in tensors]
    gather_in_large_pages(tensors)
    gather_in_large_pages(tensors[1:])
    for tensor, (address, values, version) in zip(tensors, before, strict=True):
        assert tensor.data_ptr() == address
        assert tensor._version == version
        assert torch.equal(tensor, values)


def test_what_has_no_memory_here_is_passed_over():
    gather_in_large_pages([])
    gather_in_large_pages([torch.empty(1 << 20, device="meta"), torch.empty(0)])
    real = torch.empty(1 << 20)
    with FakeTensorMode(allow_non_fake_inputs=True):
        gather_in_large_pages([torch.empty(1 << 20), real])


def test_it_is_asked_for_when_something_is_new(monkeypatch):
    asked = []
    monkeypatch.setattr(optim_module, "gather_in_large_pages", asked.append)
    layer, other = MaskedLinear(8, 8, bias=False), MaskedLinear(8, 8, bias=False)
    optimizer = MaskedSGD([layer.weight, other.weight], lr=0.1, momentum=0.9)
    layer.weight.grad = torch.ones(8, 8)

    def asks_of():
        asked.clear()
        optimizer.step()
        return [len(tensors) for tensors in asked]

    assert asks_of() == [1]  # the weight
    assert asks_of() == [2]  # and its momentum
    assert asks_of() == []
    layer.mask = torch.rand(8, 8) < 0.5
    assert asks_of() == [2]
    MaskedLinear(8, 8)  # a mask is attached: plans are made again
    assert asks_of() == []
    other.weight.grad = torch.ones(8, 8)
    assert asks_of() == [3]
    assert asks_of() == [4]
