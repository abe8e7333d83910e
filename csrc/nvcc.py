"""Compiles csrc/cuda with nvcc; needs no GPU. As toolchain.py it needs nothing but the standard library."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from toolchain import CudaToolkit

CSRC = Path(__file__).resolve().parent

FLAGS = (
    *("-std=c++20", "-O3", "--expt-relaxed-constexpr"),
    "-fmad=false",  # a product and a sum are fused where a kernel says so, not where a compiler likes
    f"-I{CSRC}",
)
HOST_FLAGS = ("-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wextra")

DEFAULT_ARCHITECTURES = "8.0 9.0+PTX"  # A100, H100 and H200; later ones from the PTX
OLDEST = (8, 0)  # what the kernels use: sums over a warp in one instruction, bfloat16


class Architectures:
    """What machine code is made for, in the words of ``TORCH_CUDA_ARCH_LIST``: "8.0 9.0+PTX"."""

    def __init__(self, wanted: str) -> None:
        self.names: list[str] = []
        """As in nvcc's -code: sm_80, or compute_90 for PTX."""
        self._flags: list[str] = []
        for word in re.split(r"[\s;]+", wanted.strip()):
            parsed = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", word)
            if parsed is None:
                raise ValueError(
                    f"TORCH_CUDA_ARCH_LIST: expected numbers such as {DEFAULT_ARCHITECTURES!r}, got {word!r}"
                )
            major, minor, variant, ptx = parsed.groups()
            if (int(major), int(minor)) < OLDEST:
                continue  # of a list that is meant for other packages too
            for code in (f"sm_{major}{minor}{variant}", f"compute_{major}{minor}{variant}"):
                if (code.startswith("sm") or ptx) and code not in self.names:
                    self.names.append(code)
                    virtual = f"compute_{major}{minor}{variant}"
                    self._flags.append(f"-gencode=arch={virtual},code={code}")
        if not self.names:
            oldest = ".".join(map(str, OLDEST))
            raise ValueError(f"TORCH_CUDA_ARCH_LIST: expected {oldest} or later, got {wanted!r}")

    @classmethod
    def from_environment(cls) -> Architectures:
        """``TORCH_CUDA_ARCH_LIST``, or the default."""
        return cls(os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHITECTURES)

    @property
    def flags(self) -> tuple[str, ...]:
        """For nvcc."""
        return tuple(self._flags)


def sources() -> list[Path]:
    """The kernels."""
    return sorted((CSRC / "cuda").glob("*.cu"))


def compile_all(
    toolkit: CudaToolkit,
    architectures: Architectures,
    folder: Path,
    *,
    host_compiler: str | None = None,
) -> list[str]:
    """Object files of all kernels, those that are out of date compiled side by side.

    Raises:
        SystemExit: a source does not compile; nvcc has said why.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = [toolkit.nvcc, *FLAGS, *HOST_FLAGS, *architectures.flags]
    if host_compiler is not None and shutil.which(host_compiler):  # not "ccache g++"
        command += ["-ccbin", host_compiler]
    record = folder / "command"  # other flags make other objects
    same = record.is_file() and record.read_text() == "\n".join(command)
    newest_header = max(path.stat().st_mtime for path in CSRC.rglob("*.*h"))

    def compiled(source: Path) -> str:
        target = folder / f"{source.stem}.o"
        newest = max(source.stat().st_mtime, newest_header)
        if not same or not target.is_file() or target.stat().st_mtime < newest:
            target.unlink(missing_ok=True)
            _run([*command, "-c", str(source), "-o", str(target)])
        return str(target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sources()))
    record.write_text("\n".join(command))
    return objects


def _run(command: Sequence[str]) -> None:
    print(" ".join(command), flush=True)
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(result.stdout, end="", flush=True)
    if result.returncode != 0:
        raise SystemExit(f"granet_kernels: {command[0]} failed on {command[-3]}")
