"""The host that runs CUDA kernels in tests: faults planted in kernels (``tests/simt/planted``) must be found.

Each kernel runs with its fault and mended: that the mended one passes shows what is found.
"""

import os
import re
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SIMT = ROOT / "tests" / "simt"
FLAGS = (
    "-std=c++20",
    "-O1",
    "-g",
    "-Wall",
    "-Wextra",
    f"-I{SIMT / 'include'}",
    f"-I{ROOT / 'csrc'}",
)
# What kernels are compiled with, and what the engine is, which ThreadSanitizer must not look at.
SANITIZERS = {
    "address": (("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),) * 2,
    "thread": (("-fsanitize=thread",), ("-DGRANET_SIMT_TSAN",)),
}
CXX = shlex.split(os.environ.get("CXX") or "c++")

pytestmark = pytest.mark.skipif(shutil.which(CXX[0]) is None, reason="no C++ compiler")


def compiled(folder: Path, source: Path, flags: tuple[str, ...]) -> Path:
    target = folder / f"{source.stem}.o"
    language = ("-x", "c++") if source.suffix == ".cu" else ()
    command = [*CXX, *FLAGS, *flags, *language, "-c", str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return target


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """The programs, by sanitizer."""
    programs = {}
    for sanitizer, (of_kernels, of_engine) in SANITIZERS.items():
        folder = tmp_path_factory.mktemp(sanitizer)
        kernels = sorted((SIMT / "planted").glob("*.c*"))
        engine = [SIMT / "engine.cpp", SIMT / "fiber.cpp"]
        work = [(source, of_kernels) for source in kernels] + [(s, of_engine) for s in engine]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(lambda item, folder=folder: compiled(folder, *item), work))
        programs[sanitizer] = folder / "planted"
        link = [*CXX, *of_kernels, *map(str, objects), "-o", str(programs[sanitizer])]
        subprocess.run(link, check=True)
    return programs


def run(program: Path, *words: str, order: str = "forward") -> subprocess.CompletedProcess[str]:
    # What a kernel had allocated when it was given up is lost.
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0", "GRANET_SIMT_ORDER": order}
    return subprocess.run([program, *words], capture_output=True, text=True, env=environment)


RACE = (66, "ThreadSanitizer: data race")
OVERFLOW = (1, "AddressSanitizer: heap-buffer-overflow")
FAULTS = [
    ("thread", "unguarded_sum", *RACE),
    ("thread", "missing_barrier", *RACE),
    ("thread", "reused_too_early", *RACE),
    ("thread", "missing_fence", *RACE),
    ("thread", "plain_counter", *RACE),
    ("thread", "warp_without_barrier", *RACE),
    ("address", "behind_the_end", *OVERFLOW),
    ("address", "before_the_start", *OVERFLOW),
    ("address", "behind_shared_memory", *OVERFLOW),
    ("address", "unaligned_vector", 1, "which requires 16 byte alignment"),
    ("address", "divergent_barrier", 3, "32 have ended; 32 wait in __syncthreads at barriers.cu:"),
    ("address", "ended_before_barrier", 3, "1 have ended; 63 wait in __syncthreads at barriers.cu"),
    ("address", "two_barriers", 3, "while others are in the one at barriers.cu:"),
    ("address", "divergent_shuffle", 3, "32 wait for the warp's threads ffffffff at barriers.cu:"),
    ("address", "shuffle_outside_mask", 3, "a shuffle reads a thread that its mask leaves out"),
    ("address", "uninitialised_shared_memory", 4, ""),  # garbage, so the result is wrong
    ("address", "too_much_shared_memory", 4, ""),  # the launch fails, as on a GPU
]


@pytest.mark.slow
@pytest.mark.parametrize("order", ["forward", "backward", "1"])
@pytest.mark.parametrize(("sanitizer", "fault", "status", "message"), FAULTS)
def test_planted_faults_are_found(planted, sanitizer, fault, status, message, order):
    """In whatever order the threads take turns."""
    found = run(planted[sanitizer], fault, order=order)
    assert found.returncode == status, found.stdout + found.stderr
    assert message in found.stdout + found.stderr


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.parametrize("fault", [fault for _, fault, *_ in FAULTS])
def test_without_the_fault_nothing_is_found(planted, sanitizer, fault):
    done = run(planted[sanitizer], fault, "mended")
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.slow
def test_every_planted_fault_is_tested(planted):
    assert run(planted["address"], "another").returncode == 2
    header = (SIMT / "planted" / "planted.h").read_text()
    names = re.findall(r"^cudaError_t (\w+)", header, re.MULTILINE)
    assert names == [fault for _, fault, *_ in FAULTS]


KERNEL = """
#include "cuda/launch.h"
{before}
__global__ void kernel(int* out, double* sum) {{
  {body}
  (void)out, (void)sum;
}}
"""


def compiles(folder: Path, body: str, before: str = "") -> bool:
    source = folder / "kernel.cu"
    source.write_text(KERNEL.format(body=body, before=before))
    command = [*CXX, *FLAGS, "-x", "c++", "-fsyntax-only", str(source)]
    return subprocess.run(command, capture_output=True).returncode == 0


def test_what_is_supported_compiles(tmp_path):
    assert compiles(tmp_path, "out[threadIdx.x] = 1;")


@pytest.mark.parametrize(
    ("body", "before"),
    [
        ("__shared__ int shared[32]; out[0] = shared[0];", ""),
        ("out[threadIdx.y] = 1;", ""),
        ("out[blockIdx.z] = 1;", ""),
        ("out[0] = __activemask();", ""),
        ("atomicAdd(sum, 1.0);", ""),
        ("__threadfence_system();", ""),
        ("out[0] = __dp4a(1, 2, 3);", ""),
        ("", "#include <cooperative_groups.h>"),
        ("", "#include <mma.h>"),
        ("", "__constant__ int table[4];"),
    ],
)
def test_what_is_not_supported_does_not_compile(tmp_path, body, before):
    assert not compiles(tmp_path, body, before)
