"""What is promised of the machine code of the CUDA C++ kernels; `make kernel-report` has all targets."""

import csv
import dataclasses
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # last: `bench` is not installed, everything else is

from bench.kernels import cubins  # noqa: E402

TOOLKIT, WHY = cubins.toolchain.find_cuda()
if TOOLKIT is None or cubins.cuobjdump() is None:
    pytest.skip(WHY or "no cuobjdump", allow_module_level=True)


@pytest.fixture(scope="module")
def rows():
    return cubins.all_rows([90], 2)


@pytest.mark.slow
def test_all_is_as_promised(rows):
    assert {row.kernel: row.faults for row in rows if row.faults} == {}


@pytest.mark.slow
def test_every_kernel_is_listed(rows):
    sources = [*ROOT.glob("csrc/cuda/*.cu"), *ROOT.glob("csrc/cuda/*.cuh")]
    written = {
        name
        for path in sources
        for name in re.findall(r"__global__ void[^;{]*?\b(\w+_kernel)\(", path.read_text())
    }
    assert written == {row.kernel.split("<")[0] for row in rows}
    assert written == {claim.kernel.split("<")[0] for claim in cubins.CLAIMS}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"local": 8}, "8 bytes of local memory and instructions for it"),
        ({"registers": 81}, "81 registers, more than 80"),
        ({"registers": 255, "kernel": "pass_kernel<unsigned long, 0>"}, None),
        ({"wide_loads": 7}, "7 of 8 loads of 16 bytes"),
        ({"generic": 2}, "2 generic accesses"),
        ({"fp64": 3}, "3 instructions in fp64"),
        ({"fp64": 3, "kernel": "pass_kernel<unsigned long, 0>"}, None),
        ({"kernel": "another_kernel"}, "nothing is claimed of it"),
    ],
)
def test_faults_are_found(change, message):
    row = cubins.Row(
        kernel="pass_kernel<unsigned int, 0>",
        source="select_32.cu",
        target="sm_90",
        registers=64,
        local=0,
        shared=16536,
        instructions=900,
        wide_loads=8,
        loads=30,
        wide_stores=0,
        stores=20,
        generic=0,
        fp64=0,
        faults="",
        nvcc="13.0",
    )
    assert cubins.faults(row) == []
    found = cubins.faults(dataclasses.replace(row, **change))
    assert found == ([] if message is None else [message])


def test_instructions_are_read_from_sass():
    body = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;        /* 0x00000a00ff017b82 */
        /*0010*/              @!P0 LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;  /* 0x0 */
        /*0020*/             @!UP0 STG.E.U8 desc[UR4][R2.64], R4 ;  /* 0x0 */
        /*0030*/                   NOP ;  /* 0x0 */
    """
    assert cubins.instructions(body) == ["LDC", "LDG.E.128.CONSTANT", "STG.E.U8"]


@pytest.mark.slow
def test_the_command(tmp_path, capsys):
    out = tmp_path / "rows.csv"
    arguments = ["--only", "table", "--target", "80", "--jobs", "1", "--out", str(out)]
    assert cubins.main(arguments) == 0
    with out.open() as file:
        made = list(csv.DictReader(file))
    assert [row["kernel"] for row in made] == ["write_table_kernel"]
    assert "1 compiled with nvcc" in capsys.readouterr().out
