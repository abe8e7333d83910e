"""What an installation holds, with a compiler and without, and that csrc/ stands alone.

Everything is built from a copy of the sources, so that products of other builds cannot slip in.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch

import granet_kernels
from granet_kernels.backends.cpp.library import LIBRARY
from granet_kernels.backends.cuda.library import LIBRARY as CUDA_LIBRARY

ROOT = Path(__file__).parents[1]
SOURCES = (
    *("setup.py", "pyproject.toml", "MANIFEST.in", "CMakeLists.txt", "Makefile", "constraints.txt"),
    *("LICENSE", "README.md", "csrc", "examples", "granet_kernels", "python", "tests"),
)


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def log(result: subprocess.CompletedProcess[str]) -> str:
    return f"{result.stdout}\n{result.stderr}"


@pytest.fixture
def tree(tmp_path):
    """A copy of the sources, without what earlier builds left among them."""
    left_out = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for name in SOURCES:
        source, target = ROOT / name, tmp_path / "tree" / name
        target.parent.mkdir(exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=left_out)
        else:
            shutil.copy(source, target)
    return tmp_path / "tree"


@pytest.fixture
def quick_compiler(tmp_path):
    """A compiler for tests that run nothing of what it makes: to optimize takes most of the time."""
    script = tmp_path / "quick-c++"
    script.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX") or "c++"} "$@" -O0\n')
    script.chmod(0o755)
    return str(script)


def pip_wheel(tree: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    options = ("--no-build-isolation", "--no-deps", "--no-index", "--verbose", "--wheel-dir", "out")
    return run(sys.executable, "-m", "pip", "wheel", *options, ".", cwd=tree, **environment)


def members(tree: Path) -> set[str]:
    [wheel] = (tree / "out").glob("granet_kernels-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tree / "site")
        return set(archive.namelist())


def python_files(package: Path, name: str) -> set[str]:
    return {f"{name}/{path.relative_to(package).as_posix()}" for path in package.rglob("*.py")}


HAS_NVCC = torch.version.cuda is not None and shutil.which("nvcc") is not None
needs_nvcc = pytest.mark.skipif(not HAS_NVCC, reason="needs nvcc and a torch with CUDA")


@pytest.mark.slow
def test_wheel_holds_both_packages_and_the_extension(tree, quick_compiler):
    """The kernels for one architecture, which shows as much as all."""
    result = pip_wheel(tree, CXX=quick_compiler, TORCH_CUDA_ARCH_LIST="9.0")
    assert result.returncode == 0, log(result)
    names = members(tree)
    expected = python_files(ROOT / "granet_kernels", "granet_kernels")
    expected |= python_files(ROOT / "python" / "granet", "granet")
    expected |= {"granet_kernels/py.typed", "granet/py.typed", "granet_kernels/_native.pyi"}
    recipes = (ROOT / "python" / "granet" / "recipes").glob("*.yaml")
    expected |= {f"granet/recipes/{path.name}" for path in recipes}
    expected |= {"granet/page/page.css", "granet/page/page.html"}
    expected |= {"granet_kernels/_granet_ops.so"}
    expected |= {"granet_kernels/_granet_cuda.so"} if HAS_NVCC else set()
    installed = {name for name in names if ".dist-info/" not in name}
    [native] = installed - expected
    assert re.fullmatch(r"granet_kernels/_native\..*\.so", native)
    assert expected <= installed
    [entry_points] = (tree / "site").glob("*.dist-info/entry_points.txt")
    assert "granet = granet.cli:main" in entry_points.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("without", ["compiler", "wish"])
def test_without_a_compiler_python_alone_is_installed_and_says_so(tree, tmp_path, without):
    if without == "compiler":
        result = pip_wheel(tree, PATH=str(tmp_path / "empty"), CXX="")
        assert "c++: not found; g++: not found; clang++: not found" in log(result)
    else:
        result = pip_wheel(tree, GRANET_BUILD_EXTENSION="0")
        assert "GRANET_BUILD_EXTENSION=0" in log(result)
    assert result.returncode == 0, log(result)
    assert "WITHOUT its compiled extension" in log(result)
    assert not any(name.endswith(".so") for name in members(tree))
    assert list((tree / "out").glob("*-py3-none-any.whl"))
    program = "import granet_kernels; import granet_kernels.backends.cpp"
    result = run(sys.executable, "-c", program, cwd=tmp_path, PYTHONPATH=str(tree / "site"))
    assert "ImportError: the compiled extension is not installed" in result.stderr, log(result)
    assert "install a C++20 compiler and run `pip install" in result.stderr


@pytest.mark.slow
def test_sources_that_do_not_compile_fail_the_installation(tree, quick_compiler):
    with (tree / "csrc" / "cpu" / "mask.cpp").open("a") as source:
        source.write("\n#error deliberately broken\n")
    result = pip_wheel(tree, CXX=quick_compiler, GRANET_BUILD_CUDA="0")
    assert result.returncode != 0
    assert "the CUDA kernels are left out: GRANET_BUILD_CUDA=0" in log(result)
    assert "deliberately broken" in log(result)
    assert list(tree.rglob("*.whl")) == []


def test_source_archive_can_build(tree):
    result = run(sys.executable, "setup.py", "-q", "sdist", cwd=tree, GRANET_BUILD_EXTENSION="0")
    assert result.returncode == 0, log(result)
    [archive] = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*.[hc]*")}
    assert {name for name in sources if "__pycache__" not in name} <= names
    assert {"setup.py", "csrc/toolchain.py", "CMakeLists.txt", "python/granet/py.typed"} <= names


ARCHITECTURES = """
import sys
sys.path.insert(0, "csrc")
import nvcc
architectures = nvcc.Architectures.from_environment()
print(*architectures.names, *architectures.flags)
"""


KERNELS = """
import pathlib, sys
sys.path.insert(0, "csrc")
import nvcc, toolchain
toolkit, _ = toolchain.find_cuda()
nvcc.compile_all(toolkit, nvcc.Architectures("9.0"), pathlib.Path("build"))
"""


@pytest.mark.parametrize(
    ("wanted", "printed"),
    [
        ("", "sm_80 sm_90 compute_90"),
        ("7.5;8.6 9.0a+PTX", "sm_86 sm_90a compute_90a"),
        ("10.0+PTX 10.0", "sm_100 compute_100"),
    ],
)
def test_architectures(wanted, printed):
    result = run(sys.executable, "-c", ARCHITECTURES, cwd=ROOT, TORCH_CUDA_ARCH_LIST=wanted)
    assert result.returncode == 0, log(result)
    names = printed.split()
    assert result.stdout.split()[: len(names)] == names
    assert result.stdout.split()[len(names) :] == [
        f"-gencode=arch={name.replace('sm', 'compute')},code={name}" for name in names
    ]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("7.0 7.5", "expected 8.0 or later, got '7.0 7.5'"),
        ("Hopper", "numbers such as '8.0 9.0+PTX'"),
    ],
)
def test_architectures_that_are_refused(wanted, message):
    result = run(sys.executable, "-c", ARCHITECTURES, cwd=ROOT, TORCH_CUDA_ARCH_LIST=wanted)
    assert result.returncode != 0
    assert message in log(result)


@needs_nvcc
@pytest.mark.slow
def test_kernels_that_do_not_compile_fail_the_installation(tree):
    (tree / "csrc" / "cuda" / "broken.cu").write_text("#error deliberately broken\n")
    for source in (tree / "csrc" / "cuda").glob("*.cu"):
        if source.name != "broken.cu":  # only for the time it takes
            source.unlink()
    result = run(sys.executable, "-c", KERNELS, cwd=tree)
    assert result.returncode != 0
    assert "deliberately broken" in log(result)
    assert "failed on" in log(result)


@needs_nvcc
@pytest.mark.slow
def test_kernels_and_example_build_with_cmake(tmp_path):
    """As a library for C++ users. For one architecture; the machine code of others is the same work again."""
    bin_folder = Path(sys.executable).parent
    environment = {"PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"}
    options = ("-DGRANET_CUDA=ON", "-DGRANET_BUILD_TESTS=OFF", "-DCMAKE_CUDA_ARCHITECTURES=90-real")
    for command in (
        ("cmake", "-S", ROOT, "-B", tmp_path / "build", "-G", "Ninja", *options),
        ("cmake", "--build", tmp_path / "build", "--target", "masked_step"),
        (tmp_path / "build" / "masked_step",),  # says so where there is no GPU
    ):
        result = run(*command, cwd=tmp_path, **environment)
        assert result.returncode == 0, log(result)


@pytest.mark.skipif(not CUDA_LIBRARY.is_file(), reason="the CUDA library is not built")
def test_cuda_library_depends_on_torch_alone(tmp_path):
    """On LibTorch's stable ABI; CUDA's runtime is inside, and nobody else sees it."""
    result = run("nm", "--dynamic", CUDA_LIBRARY, cwd=tmp_path)
    assert result.returncode == 0, log(result)
    lines = [line.split() for line in result.stdout.splitlines()]
    undefined = [words[-1] for words in lines if words[-2] == "U"]
    assert "aoti_torch_get_current_cuda_stream" in undefined
    assert [
        symbol for symbol in undefined if re.match(r"_?Py|cuda|_ZN\w*(at|c10|torch)\d", symbol)
    ] == []
    assert [words for words in lines if words[-2] == "T" and words[-1].startswith("cuda")] == []


@pytest.mark.skipif(not CUDA_LIBRARY.is_file(), reason="the CUDA library is not built")
def test_cuda_library_loads_without_a_gpu():
    """Machine code for what build_info() names; the backend is there, for tensors on a GPU."""
    status = granet_kernels.build_info()["backends"]["cuda"]
    assert status == "available"
    assert granet_kernels.build_info()["native"]["cuda_architectures"] != []


def test_build_info():
    native = granet_kernels.build_info()["native"]
    assert set(native) == {
        *("version", "compiler", "cxx_standard", "torch_abi_target", "torch_built_against"),
        *("cpu_baseline", "cpu_kernels", "cuda_toolkit", "cuda_architectures"),
    }
    assert f'version = "{native["version"]}"' in (ROOT / "pyproject.toml").read_text()
    assert native["cxx_standard"] >= 202002
    assert native["torch_abi_target"] == "2.10"
    assert re.match(r"(gcc|clang) \d+", native["compiler"])
    assert (native["cuda_architectures"] == []) == (not CUDA_LIBRARY.is_file())
    assert native["cpu_baseline"] in (["x86-64"], ["aarch64"])  # what every machine has


def test_operators_depend_on_the_stable_abi_alone(tmp_path):
    """No C++ symbol of torch and none of Python: one file for every torch and every Python."""
    result = run("nm", "--dynamic", "--undefined-only", LIBRARY, cwd=tmp_path)
    assert result.returncode == 0, log(result)
    symbols = result.stdout.split()
    assert any(symbol.startswith("aoti_torch_") for symbol in symbols)
    assert [symbol for symbol in symbols if re.match(r"_?Py|_ZN\w*(at|c10|torch)\d", symbol)] == []


def sanitizers_work(folder: Path) -> bool:
    (folder / "probe.cpp").write_text("int main() { return 0; }\n")
    compiler = os.environ.get("CXX") or "c++"
    flags = ("-fsanitize=address,undefined", "probe.cpp", "-o", "probe")
    return run(*compiler.split(), *flags, cwd=folder).returncode == 0


@pytest.mark.parametrize("sanitizers", ["", "address,undefined", "thread"])
def test_csrc_builds_and_passes_without_torch_and_python(tmp_path, sanitizers):
    if sanitizers and not sanitizers_work(tmp_path):
        pytest.skip("the compiler comes without sanitizer libraries")
    bin_folder = Path(sys.executable).parent
    environment = {"PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"}
    option = f"-DGRANET_SANITIZE={sanitizers}"
    for command in (
        ("cmake", "-S", ROOT, "-B", tmp_path / "build", "-G", "Ninja", option),
        ("cmake", "--build", tmp_path / "build"),
        (
            "ctest",
            "--test-dir",
            tmp_path / "build",
            "--output-on-failure",
            "--no-tests=error",
            "-j2",
        ),
    ):
        result = run(*command, cwd=tmp_path, **environment)
        assert result.returncode == 0, log(result)
    assert (tmp_path / "build" / "compile_commands.json").is_file()


def test_unknown_sanitizer_is_refused(tmp_path):
    environment = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    option = "-DGRANET_SANITIZE=addresses"
    result = run("cmake", "-S", ROOT, "-B", tmp_path / "build", option, cwd=tmp_path, **environment)
    assert result.returncode != 0
    assert "got 'addresses'" in log(result)


def test_everything_declared_is_pinned():
    """constraints.txt pins each package that pyproject.toml names, and names no package host."""
    text = (ROOT / "constraints.txt").read_text()
    assert "://" not in text
    pinned = {name.lower() for name in re.findall(r"^([\w-]+)==[\w.]+$", text, flags=re.MULTILINE)}
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = pyproject["project"]
    lists = [pyproject["build-system"]["requires"], project["dependencies"]]
    lists += project["optional-dependencies"].values()
    declared = {re.match(r"[\w-]+", item)[0].lower() for items in lists for item in items}
    assert declared - {"granet-kernels"} <= pinned
