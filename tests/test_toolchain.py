"""csrc/toolchain.py: compilers and toolkits are judged by what they do, not by where they lie."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "csrc" / "toolchain.py"


@pytest.fixture(scope="module")
def toolchain():
    spec = importlib.util.spec_from_file_location("granet_toolchain", SOURCE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def bare_path(monkeypatch, tmp_path):
    """An empty folder as the only one on the PATH, and no word from the environment."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    return folder


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_finds_the_compiler_of_this_machine(toolchain):
    compiler, reason = toolchain.find_cxx()
    assert compiler is not None, reason
    assert compiler.version


def test_no_compiler(toolchain, bare_path):
    compiler, reason = toolchain.find_cxx()
    assert compiler is None
    assert reason == "c++: not found; g++: not found; clang++: not found"


def test_a_compiler_that_cannot_build_cxx20_is_passed_over(toolchain, bare_path, monkeypatch):
    script(bare_path / "c++", 'echo "error: unrecognized option -std=c++20" >&2; exit 1')
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    compiler, reason = toolchain.find_cxx()
    assert compiler is None
    assert "no-such-compiler -m64: not found" in reason
    assert "c++: cannot build a C++20 program (error: unrecognized option -std=c++20)" in reason
    script(bare_path / "clang++", "echo fake 20.1")
    compiler, _ = toolchain.find_cxx()
    assert (compiler.command, compiler.version) == ("clang++", "fake 20.1")


def fake_nvcc(folder: Path, top: Path) -> Path:
    """A script that reports a toolkit elsewhere, in the words of nvcc 13."""
    report = "\n".join(
        f"#$ {line}"
        for line in (
            f"_HERE_={top}/bin",
            f"TOP={top}/bin/..",
            f'INCLUDES="-I{top}/bin/../targets/x86_64-linux/include"  ',
            f'LIBRARIES=  "-L{top}/gone" "-L{top}/bin/../targets/x86_64-linux/lib"',
            "cicc --c++17",
        )
    )
    return script(
        folder / "nvcc",
        'if [ "$1" = --version ]; then echo "tools, release 13.1, V13.1.5"; exit; fi\n'
        f"cat >&2 <<'END'\n{report}\nEND",
    )


def make_toolkit(top: Path) -> None:
    for folder in ("bin", "targets/x86_64-linux/include", "targets/x86_64-linux/lib"):
        (top / folder).mkdir(parents=True)
    (top / "targets/x86_64-linux/include/cuda_runtime.h").touch()


def usable_path(bare_path: Path) -> None:
    (bare_path / "cat").symlink_to(shutil.which("cat", path="/usr/bin:/bin"))


def test_a_wrapper_leads_to_the_toolkit_it_reports(toolchain, bare_path, tmp_path):
    usable_path(bare_path)
    top = tmp_path / "a toolkit"
    make_toolkit(top)
    wrapper = fake_nvcc(bare_path, top)
    toolkit, reason = toolchain.find_cuda()
    assert toolkit is not None, reason
    assert (toolkit.nvcc, toolkit.version, toolkit.home) == (str(wrapper), "13.1", top)
    assert toolkit.include_dirs == (top / "targets/x86_64-linux/include",)
    assert toolkit.library_dirs == (
        top / "targets/x86_64-linux/lib",
    )  # the missing one is left out


def test_a_toolkit_without_headers_is_refused(toolchain, bare_path, tmp_path, monkeypatch):
    usable_path(bare_path)
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda name: None)
    make_toolkit(tmp_path / "toolkit")
    (tmp_path / "toolkit/targets/x86_64-linux/include/cuda_runtime.h").unlink()
    fake_nvcc(bare_path, tmp_path / "toolkit")
    toolkit, reason = toolchain.find_cuda()
    assert toolkit is None
    assert "no cuda_runtime.h in the folders it reports" in reason


def test_cuda_home_comes_first(toolchain, bare_path, tmp_path, monkeypatch):
    usable_path(bare_path)
    for name in ("on the path", "home"):
        make_toolkit(tmp_path / name)
    fake_nvcc(bare_path, tmp_path / "on the path")
    fake_nvcc(tmp_path / "home" / "bin", tmp_path / "home")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    toolkit, _ = toolchain.find_cuda()
    assert toolkit.home == tmp_path / "home"
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nothing here"))
    toolkit, _ = toolchain.find_cuda()
    assert toolkit.home == tmp_path / "on the path"


def test_the_nvcc_of_a_wheel_is_found(toolchain, bare_path, tmp_path, monkeypatch):
    usable_path(bare_path)
    make_toolkit(tmp_path / "nvidia" / "cu13")
    fake_nvcc(tmp_path / "nvidia" / "cu13" / "bin", tmp_path / "nvidia" / "cu13")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    toolkit, reason = toolchain.find_cuda()
    assert toolkit is not None, reason
    assert toolkit.home == tmp_path / "nvidia" / "cu13"


def test_no_nvcc(toolchain, bare_path, monkeypatch):
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda name: None)
    assert toolchain.find_cuda() == (
        None,
        "no nvcc below CUDA_HOME, on the PATH or in the nvidia-cuda-nvcc wheel",
    )


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc on the PATH")
def test_the_toolkit_of_this_machine_has_its_headers(toolchain):
    toolkit, reason = toolchain.find_cuda()
    assert toolkit is not None, reason
    assert any((folder / "cuda_runtime.h").is_file() for folder in toolkit.include_dirs)
    assert any(next(folder.glob("libcudart*"), None) for folder in toolkit.library_dirs)
    assert (toolkit.home / "bin" / "nvcc").is_file()


def test_as_a_program_it_prints_what_it_finds_and_fails_without_a_compiler(bare_path):
    def run(**environment):
        command = [sys.executable, "-S", str(SOURCE)]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)

    without = run(PATH=str(bare_path))
    assert without.returncode == 1
    assert "C++20 compiler: none (c++: not found" in without.stdout
    script(bare_path / "g++", "echo fake 15.2")
    found = run(PATH=str(bare_path))
    assert found.returncode == 0
    assert "C++20 compiler: g++ (fake 15.2)" in found.stdout
