"""CUB's DeviceTopK beside the other selections: compiled where a row is built, if CCCL 3.3 or later is there.

Its headers come with a CUDA toolkit from 13.1 on, and alone in the wheel nvidia-cuda-cccl; `CCCL_HOME`
names the folder that holds `cub/`.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from bench.registry import Case, Setting, UnavailableError, Yardstick, register
from bench.yardsticks.selection import DISTRIBUTIONS, KEEP, Values

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "bench" / "cub" / "topk.cu"
HEADER = Path("cub", "device", "device_topk.cuh")

TopK = Callable[[Tensor, int], object]


def _include_folders() -> Iterator[Path]:
    if home := os.environ.get("CCCL_HOME"):
        yield Path(home)
    nvidia = importlib.util.find_spec("nvidia")
    for folder in (nvidia.submodule_search_locations or ()) if nvidia else ():
        yield from sorted(Path(folder).glob("*/include/cccl"))


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled `cub_topk`, for this process.

    Raises:
        UnavailableError: there is no nvcc, or no CCCL that has what is needed.
    """
    if str(ROOT / "csrc") not in sys.path:
        sys.path.append(str(ROOT / "csrc"))
    import toolchain

    toolkit, reason = toolchain.find_cuda()
    if toolkit is None:
        raise UnavailableError(reason)
    folders = [*_include_folders(), *(path / "cccl" for path in toolkit.include_dirs)]
    found = next((folder for folder in folders if (folder / HEADER).is_file()), None)
    if found is None:
        raise UnavailableError(f"no {HEADER}: pip install nvidia-cuda-cccl, or set CCCL_HOME")
    target = Path(tempfile.mkdtemp(prefix="granet-cub-"), "topk.so")
    flags = ["-std=c++20", "-O3", "-shared", "-Xcompiler", "-fPIC", f"-I{found}", "-arch=native"]
    command = [toolkit.nvcc, *flags, str(SOURCE), "-o", str(target)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{SOURCE.name} does not compile: {result.stderr[-300:]}")
    return ctypes.CDLL(str(target))


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr() if tensor is not None else None)


class CubTopK:
    """The k largest values, and with `indices` where they are; memory is there beforehand."""

    def __init__(self, values: Tensor, k: int, indices: bool) -> None:
        self._topk = library().cub_topk
        self._k, self._values = k, torch.empty(k, device=values.device)
        self._indices = torch.empty(k, dtype=torch.int32, device=values.device) if indices else None
        self._memory: Tensor | None = None
        self._bytes = ctypes.c_size_t(0)
        self(values)
        self._memory = torch.empty(self._bytes.value, dtype=torch.uint8, device=values.device)

    def __call__(self, values: Tensor) -> None:
        status = self._topk(
            _pointer(self._memory),
            ctypes.byref(self._bytes),
            _pointer(values),
            _pointer(self._values),
            _pointer(self._indices),
            ctypes.c_int32(values.numel()),
            ctypes.c_int32(self._k),
            ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
        )
        if status != 0:
            raise RuntimeError(f"cub_topk: CUDA error {status}")

    def check(self, values: Tensor) -> None:
        """Right, or there is nothing to time."""
        self(values)
        expected = torch.topk(values, self._k).values
        if not torch.equal(self._values.sort(descending=True).values, expected):
            raise RuntimeError("cub_topk: not the k largest")
        if self._indices is not None and not torch.equal(
            values[self._indices.long()], self._values
        ):
            raise RuntimeError("cub_topk: indices of other values")


def build_cub(indices: bool, distribution: str, setting: Setting) -> Case:
    """The k largest of magnitudes concatenated beforehand."""
    values = Values(distribution, setting)
    k = int(values.numel * KEEP)
    topk = CubTopK(values.next(), k, indices)
    topk.check(values.next())
    return Case(
        run=lambda: topk(values.next()),
        n_tensors=1,
        n_weights=values.numel,
        model_bytes=3 * 4 * values.numel + (8 if indices else 4) * k,
        account="3 reads + results",
        copies=values.copies,
    )


register(
    *(
        Yardstick(
            group="selection",
            name=f"select_{distribution}",
            variant="cub_topk_pairs" if indices else "cub_topk",
            build=functools.partial(build_cub, indices, distribution),
            baseline=f"select_{distribution}/torch_sum",
            graph=True,
            cuda_only=True,
        )
        for distribution in DISTRIBUTIONS
        for indices in (False, True)
    )
)
