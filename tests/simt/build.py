"""Builds the CUDA backend for the host: ``python tests/simt/build.py`` (``make simt``).

The sources of csrc/cuda are compiled as C++ against tests/simt, with the adaptors of csrc/torch/cuda for
tensors on the CPU, into build/simt/_granet_cuda.so. With GRANET_SIMT=1 the backend loads that instead.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "simt"
LIBRARY = FOLDER / "_granet_cuda.so"

FLAGS = [
    *("-std=c++20", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"),
    *("-Wall", "-Wextra", "-Wno-unknown-pragmas"),  # of which `#pragma unroll` is one
    # Accesses of 16 bytes must be aligned, as on a GPU; on the host they would work.
    *("-fsanitize=alignment", "-fno-sanitize-recover=all"),
    "-DTORCH_TARGET_VERSION=0x020a000000000000ULL",
]


def sources() -> list[Path]:
    """Of the library."""
    return [
        *sorted((ROOT / "csrc" / "cuda").glob("*.cu")),
        *sorted((ROOT / "csrc" / "torch" / "cuda").glob("*.cpp")),
        *(ROOT / "tests" / "simt" / name for name in ("engine.cpp", "fiber.cpp")),
    ]


def compiler() -> list[str]:
    """The command, with what all files are compiled with."""
    from torch.utils import cpp_extension

    includes = [ROOT / "tests" / "simt" / "include", ROOT / "csrc"]
    return [
        *shlex.split(os.environ.get("CXX") or "c++"),
        *FLAGS,
        *(f"-I{folder}" for folder in includes),
        *(word for folder in cpp_extension.include_paths() for word in ("-isystem", folder)),
    ]


def newest_header() -> float:
    """When the last of the headers was changed."""
    folders = (ROOT / "csrc", ROOT / "tests" / "simt")
    headers = (path for folder in folders for path in folder.rglob("*.*h"))
    return max(path.stat().st_mtime for path in [*headers, Path(__file__)])


def compiled(source: Path, command: list[str], headers: float) -> Path:
    """The object file of a source; made anew where something it may depend on is younger."""
    target = FOLDER / f"{source.parent.parent.name}-{source.parent.name}-{source.name}.o"
    if not target.exists() or target.stat().st_mtime < max(source.stat().st_mtime, headers):
        language = ["-x", "c++"] if source.suffix == ".cu" else []
        partial = target.with_suffix(f".{os.getpid()}.part")
        subprocess.run([*command, *language, "-c", str(source), "-o", str(partial)], check=True)
        partial.rename(target)
    return target


def build() -> Path:
    """The library, up to date."""
    from torch.utils import cpp_extension

    FOLDER.mkdir(parents=True, exist_ok=True)
    command, headers = compiler(), newest_header()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda source: compiled(source, command, headers), sources()))
    if not LIBRARY.exists() or any(o.stat().st_mtime > LIBRARY.stat().st_mtime for o in objects):
        paths = [f"-L{folder}" for folder in cpp_extension.library_paths()]
        partial = LIBRARY.with_suffix(f".{os.getpid()}.part")
        link = [*command, "-shared", *map(str, objects), *paths, "-ltorch_cpu", "-o", str(partial)]
        subprocess.run(link, check=True)
        partial.rename(LIBRARY)
    return LIBRARY


if __name__ == "__main__":
    try:
        print(build())
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
