"""Finds a C++20 compiler and a CUDA toolkit by asking the programs themselves.

Needs nothing outside the standard library: ``setup.py`` loads it before it knows whether there is
anything to build, and ``python csrc/toolchain.py`` prints what it finds.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CXX20_PROGRAM = """\
#include <bit>
#include <concepts>
template <std::unsigned_integral Word>
constexpr int ones(Word word) { return std::popcount(word); }
int main() { static_assert(ones(7u) == 3); return 0; }
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Compiler:
    """A C++ compiler that has compiled and linked a C++20 program."""

    command: str
    """As it is to be called; may hold arguments, as ``$CXX`` may."""
    version: str
    """The first line of ``--version``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CudaToolkit:
    """A CUDA toolkit, as its ``nvcc`` describes it."""

    nvcc: str
    version: str
    """Major and minor, such as ``"13.0"``."""
    home: Path
    """nvcc's own TOP: what ``CUDA_HOME`` should be."""
    include_dirs: tuple[Path, ...]
    library_dirs: tuple[Path, ...]


def find_cxx() -> tuple[Compiler | None, str]:
    """The first of ``$CXX``, c++, g++ and clang++ that builds a C++20 program, or None and why."""
    reasons = []
    for command in filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")):
        words = shlex.split(command)
        if shutil.which(words[0]) is None:
            reasons.append(f"{command}: not found")
        elif error := _cxx20_error(words):
            reasons.append(f"{command}: cannot build a C++20 program ({error})")
        else:
            return Compiler(
                command=command, version=_output([*words, "--version"]).splitlines()[0]
            ), ""
    return None, "; ".join(reasons)


def find_cuda() -> tuple[CudaToolkit | None, str]:
    """The toolkit of the first usable ``nvcc``, or None and why.

    Looked for below ``$CUDA_HOME``, on the PATH, and in the ``nvidia-cuda-nvcc`` wheel. An nvcc may
    be a script that calls one elsewhere, so the folder it lies in says nothing: the toolkit's
    directories are those that nvcc reports itself.
    """
    reasons = []
    for nvcc in _nvcc_candidates():
        toolkit, reason = _describe_toolkit(nvcc)
        if toolkit is not None:
            return toolkit, ""
        reasons.append(f"{nvcc}: {reason}")
    return None, "; ".join(
        reasons
    ) or "no nvcc below CUDA_HOME, on the PATH or in the nvidia-cuda-nvcc wheel"


def _cxx20_error(words: list[str]) -> str:
    """Why the compiler cannot build a C++20 program; empty if it can."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(CXX20_PROGRAM)
        build = _run([*words, "-std=c++20", str(source), "-o", str(Path(folder, "probe"))])
    if build is None:
        return "it does not start"
    return (
        ""
        if build.returncode == 0
        else _first_error(build.stderr) or f"exit status {build.returncode}"
    )


def _first_error(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[0] if lines else "")


def _nvcc_candidates() -> Iterator[str]:
    if home := os.environ.get("CUDA_HOME"):
        yield str(Path(home, "bin", "nvcc"))
    if on_path := shutil.which("nvcc"):
        yield on_path
    nvidia = importlib.util.find_spec("nvidia")
    for folder in (nvidia.submodule_search_locations or ()) if nvidia else ():
        yield from (str(nvcc) for nvcc in sorted(Path(folder).glob("*/bin/nvcc")))


def _describe_toolkit(nvcc: str) -> tuple[CudaToolkit | None, str]:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cu")
        source.touch()
        dry_run = _run([nvcc, "--dryrun", "-c", str(source), "-o", str(Path(folder, "probe.o"))])
    if dry_run is None:
        return None, "it does not start"
    settings = dict(re.findall(r"^#\$ (\w+)=(.*)$", dry_run.stderr, flags=re.MULTILINE))
    includes = _directories(settings.get("INCLUDES", ""), "-I")
    release = re.search(r"release (\d+\.\d+)", _output([nvcc, "--version"]))
    if dry_run.returncode != 0 or "TOP" not in settings or release is None:
        return None, _first_error(dry_run.stderr) or "it does not describe a toolkit"
    if not any((folder / "cuda_runtime.h").is_file() for folder in includes):
        return None, f"no cuda_runtime.h in the folders it reports: {[*map(str, includes)]}"
    toolkit = CudaToolkit(
        nvcc=nvcc,
        version=release[1],
        home=Path(settings["TOP"]).resolve(),
        include_dirs=includes,
        library_dirs=_directories(settings.get("LIBRARIES", ""), "-L"),
    )
    return toolkit, ""


def _directories(flags: str, prefix: str) -> tuple[Path, ...]:
    """The existing folders named by the ``prefix`` flags of a line of nvcc's."""
    folders = (
        Path(flag.removeprefix(prefix)) for flag in shlex.split(flags) if flag.startswith(prefix)
    )
    return tuple(folder.resolve() for folder in folders if folder.is_dir())


def _run(command: list[str]) -> subprocess.CompletedProcess[str] | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None


def _output(command: list[str]) -> str:
    result = _run(command)
    return result.stdout if result is not None and result.stdout else "unknown"


def main() -> int:
    """Print the compiler and the toolkit; exit status 1 without a compiler."""
    compiler, no_compiler = find_cxx()
    toolkit, no_toolkit = find_cuda()
    if compiler is None:
        print(f"C++20 compiler: none ({no_compiler})")
    else:
        print(f"C++20 compiler: {compiler.command} ({compiler.version})")
    if toolkit is None:
        print(f"CUDA toolkit: none ({no_toolkit})")
    else:
        print(f"CUDA toolkit: {toolkit.version} in {toolkit.home}")
    return 1 if compiler is None else 0


if __name__ == "__main__":
    sys.exit(main())
