"""Builds the compiled part of granet_kernels. All metadata is in pyproject.toml.

Two libraries come out of it: ``_granet_ops.so`` holds the operators, depends on LibTorch's stable
ABI but not on Python, and is loaded by path; ``_native`` is a Python module without torch.

Without a C++20 compiler, or with ``GRANET_BUILD_EXTENSION=0``, both are left out and the reference
backend remains. A compiler that is present but cannot build our sources fails the installation.
"""

import contextlib
import os
import sys
import tomllib
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT / "csrc"))

import toolchain  # noqa: E402 - in csrc/

VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
OPERATORS = "granet_kernels._granet_ops"
TORCH_ABI_TARGET = "2.10"
# -ffp-contract=off: a product and a sum are fused where a kernel says so, not where a compiler likes.
CXX_FLAGS = [
    *("-std=c++20", "-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=off"),
    *("-Wall", "-Wextra"),
]


def abi_version(release: str) -> str:
    """``release`` ("2.10") for TORCH_TARGET_VERSION: major and minor in the two highest bytes."""
    major, minor = map(int, release.split("."))
    return f"0x{major << 56 | minor << 48:016x}ULL"


def sources(*folders: str) -> list[str]:
    return sorted(
        str(path.relative_to(ROOT))
        for folder in folders
        for path in (ROOT / "csrc" / folder).glob("*.cpp")
    )


def native_build() -> dict[str, object]:
    """What ``setup()`` needs to compile both libraries against the installed torch."""
    try:
        import pybind11
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        raise SystemExit(
            f"granet_kernels: building the compiled extension needs {error.name}. Install "
            "torch>=2.10, pybind11 and ninja first, or set GRANET_BUILD_EXTENSION=0 to install the "
            "reference backend only."
        ) from error

    class BuildNative(cpp_extension.BuildExtension):  # type: ignore[misc]
        def get_ext_filename(self, fullname: str) -> str:
            """The operators serve every Python, so their file carries no interpreter's tag."""
            if fullname.endswith("_granet_ops"):
                return f"{fullname.replace('.', os.sep)}.so"
            return str(super().get_ext_filename(fullname))

    cuda, _ = toolchain.find_cuda()
    headers = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").rglob("*.h"))]
    operators = Extension(
        OPERATORS,
        sources("cpu", "torch"),
        include_dirs=[str(ROOT / "csrc"), *cpp_extension.include_paths()],
        library_dirs=cpp_extension.library_paths(),
        libraries=["torch_cpu"],
        define_macros=[("TORCH_TARGET_VERSION", abi_version(TORCH_ABI_TARGET))],
        extra_compile_args=CXX_FLAGS,
        depends=headers,
        language="c++",
    )
    native = Extension(
        "granet_kernels._native",
        [*sources("python"), "csrc/cpu/isa.cpp"],
        include_dirs=[str(ROOT / "csrc"), pybind11.get_include()],
        define_macros=[
            ("GRANET_VERSION", VERSION),
            ("GRANET_TORCH_ABI_TARGET", TORCH_ABI_TARGET),
            ("GRANET_TORCH_VERSION", torch.__version__),
            ("GRANET_CUDA_TOOLKIT", cuda.version if cuda else ""),
        ],
        extra_compile_args=CXX_FLAGS,
        language="c++",
    )
    return {"ext_modules": [operators, native], "cmdclass": {"build_ext": BuildNative}}


def reference_only(why: str) -> dict[str, object]:
    """What ``setup()`` needs to install Python alone, and to say so."""
    text = f"""
    ************************************************************************************
    granet_kernels is installed WITHOUT its compiled extension: {why}
    Only the reference backend (pure PyTorch, slow) will be available. To get the fast
    one, install a C++20 compiler (g++ 11 or clang++ 14, or later) and install again:
        pip install --no-build-isolation .
    ************************************************************************************
    """

    class BuildPython(build_py):
        def run(self) -> None:
            print(text, file=sys.stderr, flush=True)
            # pip hides the output of a build that succeeds; a terminal, if there is one, shows it.
            with contextlib.suppress(OSError), open("/dev/tty", "w") as terminal:
                terminal.write(text)
            super().run()

    return {"cmdclass": {"build_py": BuildPython}}


def build() -> dict[str, object]:
    if os.environ.get("GRANET_BUILD_EXTENSION") == "0":
        return reference_only("GRANET_BUILD_EXTENSION=0.")
    compiler, reason = toolchain.find_cxx()
    if compiler is None:
        return reference_only(f"no C++20 compiler was found\n    ({reason}).")
    os.environ["CXX"] = compiler.command
    return native_build()


setup(**build())
