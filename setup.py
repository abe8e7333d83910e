"""Builds the compiled part of granet_kernels. All metadata is in pyproject.toml.

Up to three libraries come out of it: ``_granet_ops.so`` holds the operators for the CPU, depends on
LibTorch's stable ABI but not on Python, and is loaded by path, as is ``_granet_cuda.so``, those for
GPUs; ``_native`` is a Python module without torch.

Without a C++20 compiler, or with ``GRANET_BUILD_EXTENSION=0``, all are left out and the reference
backend remains. ``_granet_cuda.so`` is built where nvcc is found and torch is built with CUDA, unless
``GRANET_BUILD_CUDA=0``, and needs no GPU. A compiler that is present but cannot build our sources fails
the installation.
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

import nvcc  # noqa: E402 - in csrc/
import toolchain  # noqa: E402

VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
OPERATORS = "granet_kernels._granet_ops"
CUDA_OPERATORS = "granet_kernels._granet_cuda"
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
            if fullname.endswith(("_granet_ops", "_granet_cuda")):
                return f"{fullname.replace('.', os.sep)}.so"
            return str(super().get_ext_filename(fullname))

        def build_extension(self, extension: Extension) -> None:
            """Kernels are compiled when the library that holds them is."""
            if extension.name == CUDA_OPERATORS:
                extension.extra_objects = nvcc.compile_all(
                    cuda,
                    architectures,
                    Path(self.build_temp, "cuda"),
                    host_compiler=os.environ["CXX"],
                )
            super().build_extension(extension)

    cuda, architectures = cuda_build(torch.version.cuda)
    headers = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").rglob("*.*h"))]
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
    extensions = [operators]
    if cuda is not None:
        kernels = [str(path.relative_to(ROOT)) for path in nvcc.sources()]
        extensions.append(
            Extension(
                CUDA_OPERATORS,
                sources("torch/cuda"),
                include_dirs=[
                    str(ROOT / "csrc"),
                    *cpp_extension.include_paths(),
                    *map(str, cuda.include_dirs),
                ],
                library_dirs=[*cpp_extension.library_paths(), *map(str, cuda.library_dirs)],
                # The runtime is linked in, so that nothing but torch is needed where it is loaded.
                libraries=["torch_cpu", "torch_cuda", "cudart_static", "rt", "dl", "pthread"],
                define_macros=[
                    ("TORCH_TARGET_VERSION", abi_version(TORCH_ABI_TARGET)),
                    ("USE_CUDA", None),  # so that the stable ABI's headers tell of streams
                ],
                extra_compile_args=CXX_FLAGS,
                extra_link_args=["-Wl,--exclude-libs,ALL"],  # the runtime is nobody else's
                depends=[*headers, *kernels],
                language="c++",
            )
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
            ("GRANET_CUDA_ARCHITECTURES", ":".join(architectures.names) if cuda else ""),
        ],
        extra_compile_args=CXX_FLAGS,
        language="c++",
    )
    return {"ext_modules": [*extensions, native], "cmdclass": {"build_ext": BuildNative}}


def cuda_build(torch_cuda: str | None) -> tuple[toolchain.CudaToolkit | None, nvcc.Architectures]:
    """The toolkit that compiles the kernels, or None where they are left out, which is said; and for what."""
    architectures = nvcc.Architectures.from_environment()
    toolkit, reason = toolchain.find_cuda()
    if os.environ.get("GRANET_BUILD_CUDA") == "0":
        toolkit, reason = None, "GRANET_BUILD_CUDA=0"
    elif torch_cuda is None:
        toolkit, reason = None, "the installed torch is built without CUDA"
    if toolkit is None:
        print(
            f"granet_kernels: the CUDA kernels are left out: {reason}", file=sys.stderr, flush=True
        )
    return toolkit, architectures


def reference_only(why: str) -> dict[str, object]:
    """What ``setup()`` needs to install Python alone, and to say so."""
    text = f"""
    ************************************************************************************
    granet_kernels is installed WITHOUT its compiled extension: {why}
    Only the reference backend (pure PyTorch, slow) will be available. To get the fast
    one, install a C++20 compiler (g++ 12 or clang++ 14, or later) and install again:
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
