"""Builds the CUDA backend for the host: ``python tests/simt/build.py`` (``make simt``).

The sources of csrc/cuda are compiled as C++ against tests/simt, into two libraries in build/simt:
``_granet_cuda.so`` with the adaptors of csrc/torch/cuda for tensors on the CPU, which the backend loads
instead of its own with GRANET_SIMT=1, and ``granet_simt``, a module for NumPy arrays.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SIMT = ROOT / "tests" / "simt"
FOLDER = ROOT / "build" / "simt"
LIBRARY = FOLDER / "_granet_cuda.so"
MODULE = FOLDER / f"granet_simt{sysconfig.get_config_var('EXT_SUFFIX')}"

FLAGS = [
    *("-std=c++20", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"),
    *("-Wall", "-Wextra", "-Wno-unknown-pragmas"),  # of which `#pragma unroll` is one
    # Accesses of 16 bytes must be aligned, as on a GPU; on the host they would work.
    *("-fsanitize=alignment", "-fno-sanitize-recover=all"),
    "-DTORCH_TARGET_VERSION=0x020a000000000000ULL",
]

KERNELS = [
    *sorted((ROOT / "csrc" / "cuda").glob("*.cu")),
    *(SIMT / name for name in ("engine.cpp", "fiber.cpp")),
]
SOURCES = {
    LIBRARY: [*KERNELS, *sorted((ROOT / "csrc" / "torch" / "cuda").glob("*.cpp"))],
    MODULE: [*KERNELS, SIMT / "module.cpp"],
}


def compiler() -> list[str]:
    """The command, with what all files are compiled with."""
    import pybind11
    from torch.utils import cpp_extension

    foreign = [
        *cpp_extension.include_paths(),
        pybind11.get_include(),
        sysconfig.get_path("include"),
    ]
    return [
        *shlex.split(os.environ.get("CXX") or "c++"),
        *FLAGS,
        *(f"-I{folder}" for folder in (SIMT / "include", SIMT, ROOT / "csrc")),
        *(word for folder in foreign for word in ("-isystem", folder)),
    ]


def newest_header() -> float:
    """When the last of the headers was changed."""
    headers = (path for folder in (ROOT / "csrc", SIMT) for path in folder.rglob("*.*h"))
    return max(path.stat().st_mtime for path in [*headers, Path(__file__)])


def made(target: Path, newest: float, command: Callable[[Path], list[str]]) -> Path:
    """Run the command for a target that is missing or out of date; nobody sees it half written."""
    if not target.exists() or target.stat().st_mtime < newest:
        partial = target.with_suffix(f".{os.getpid()}.part")
        subprocess.run(command(partial), check=True)
        partial.rename(target)
    return target


def build() -> None:
    """Both libraries, up to date."""
    from torch.utils import cpp_extension

    FOLDER.mkdir(parents=True, exist_ok=True)
    command, headers = compiler(), newest_header()

    def compiled(source: Path) -> Path:
        language = ["-x", "c++"] if source.suffix == ".cu" else []
        target = FOLDER / f"{source.parent.parent.name}-{source.parent.name}-{source.name}.o"
        newest = max(source.stat().st_mtime, headers)
        return made(
            target, newest, lambda out: [*command, *language, "-c", str(source), "-o", str(out)]
        )

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        sources = sorted({source for sources in SOURCES.values() for source in sources})
        objects = dict(zip(sources, pool.map(compiled, sources), strict=True))
    torch = [*(f"-L{folder}" for folder in cpp_extension.library_paths()), "-ltorch_cpu"]
    for library, of_library in SOURCES.items():
        needed = [str(objects[source]) for source in of_library]
        newest = max(Path(path).stat().st_mtime for path in needed)
        others = torch if library == LIBRARY else []
        link = [*command, "-shared", *needed, *others]
        made(library, newest, lambda out, link=link: [*link, "-o", str(out)])


if __name__ == "__main__":
    try:
        build()
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
