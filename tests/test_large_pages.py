"""Weights and momenta in large pages: nobody may notice, but the system, which counts them."""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from granet_kernels import MaskedLinear, MaskedSGD
from granet_kernels.large_pages import gather_in_large_pages
from granet_kernels.selftest import backends_with

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
MEBI = 1 << 20


def _can_gather():
    release = tuple(map(int, re.findall(r"\d+", platform.release())[:2]))
    is_new = platform.system() == "Linux" and release >= (6, 1)
    return is_new and SETTING.exists() and "[never]" not in SETTING.read_text()


pytestmark = pytest.mark.skipif(
    "cpp" not in backends_with("masked_sgd_"), reason="the cpp backend is not built"
)
needs_large_pages = pytest.mark.skipif(
    not _can_gather(), reason="needs Linux 6.1 with transparent huge pages"
)


def in_large_pages(tensor):
    """Bytes of the mappings that hold a tensor's memory which lie in large pages."""
    first, last = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    found = 0
    overlaps = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if mapping := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            start, end = (int(address, 16) for address in mapping.groups())
            overlaps = start < last and first < end
        elif overlaps and (size := re.match(r"AnonHugePages: +(\d+) kB", line)):
            found += int(size[1]) * 1024
    return found


def stepped():
    """A layer of 64 MB after steps of MaskedSGD, and its momentum."""
    torch.manual_seed(0)
    layer = MaskedLinear(4096, 4096, bias=False)
    layer.mask = torch.rand(layer.weight.shape) < 0.1
    layer.weight.grad = torch.randn(layer.weight.shape)
    optimizer = MaskedSGD(layer.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        optimizer.step()
    return layer, optimizer.momentum_of(layer.weight)


@needs_large_pages
def test_a_steps_weights_and_momenta_lie_in_large_pages():
    layer, momentum = stepped()
    for tensor in (layer.weight, momentum):
        assert in_large_pages(tensor) >= tensor.nbytes - 4 * MEBI  # but for its ends


@needs_large_pages
@pytest.mark.parametrize("setting", [{"GRANET_BACKEND": "reference"}, {"GRANET_LARGE_PAGES": "0"}])
def test_memory_is_left_alone(setting):
    """In a process without the large pages of other tests, whose mappings may have become one with these."""
    script = (
        "from tests.test_large_pages import in_large_pages, stepped\n"
        "layer, momentum = stepped()\n"
        "assert in_large_pages(layer.weight) == in_large_pages(momentum) == 0"
    )
    subprocess.run([sys.executable, "-c", script], env={**os.environ, **setting}, check=True)


def test_addresses_and_contents_stay():
    tensors = [torch.randn(2000, 777), torch.randn(3, 5), torch.randn(512, 512, 3, 3).double()]
    tensors.append(torch.randn(64, 300, 9, 7).to(memory_format=torch.channels_last))
    tensors.append(torch.nn.Parameter(torch.randn(1 << 20)))
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
