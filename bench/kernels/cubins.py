"""`python -m bench.kernels.cubins`: the CUDA C++ kernels compiled by nvcc, and what their code is like.

No GPU is needed. Prints a table and fails where code is not what `CLAIMS` promise: nothing in local
memory, accesses of 16 bytes where they matter, nothing in fp64 that is not fp64, and few enough
registers for the blocks that are to be resident together.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT / "csrc") not in sys.path:
    sys.path.append(str(ROOT / "csrc"))

import nvcc  # noqa: E402 - in csrc/
import toolchain  # noqa: E402 - in csrc/

TARGETS = (80, 90, 100)
"""Compute capabilities times ten: A100, H100 and H200, B200."""

WIDE = ".128"
OUT = Path("bench/results/kernels")


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """What is promised of a kernel in all its specializations; read from SASS."""

    kernel: str
    """Its name, where need be with `<` and the first template argument."""
    registers: int
    """The most a thread may have: the launch bounds' threads and blocks must fit on a multiprocessor."""
    wide_loads: int = 0
    """At least so many different loads of 16 bytes."""
    wide_stores: int = 0
    fp64: bool = False
    """Whether fp64 is computed with even where no tensor is fp64."""


# 65 536 registers on a multiprocessor of each target.
CLAIMS = (
    Claim(kernel="write_table_kernel", registers=64),
    Claim(kernel="pack_mask_kernel", registers=64, wide_loads=1),
    Claim(kernel="unpack_mask_kernel", registers=64, wide_stores=1),
    Claim(kernel="count_active_kernel", registers=64, wide_loads=1),
    Claim(kernel="zero_inactive_kernel", registers=128, wide_loads=4, wide_stores=4),
    Claim(kernel="mask_cast_kernel", registers=128, wide_loads=4, wide_stores=4),
    Claim(kernel="masked_sgd_kernel", registers=128, wide_loads=4, wide_stores=2),
    Claim(kernel="write_counts_kernel", registers=64),
    Claim(kernel="prepare_kernel", registers=64),
    Claim(kernel="count_kernel", registers=64, fp64=True),  # ceil(p * active) is one IEEE double
    Claim(kernel="sample_kernel", registers=80),  # single elements, far from one another
    # Eight numbers of fp32 are two accesses, and the four groups of a tile are asked for together.
    *(
        Claim(kernel=f"{kernel}<{key}", registers=registers, wide_loads=8)
        for kernel in ("pass_kernel", "tie_kernel", "apply_kernel")
        for key, registers in (("unsigned int", 80), ("unsigned long", 255))
    ),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A line of the CSV."""

    kernel: str
    """With its template arguments."""
    source: str
    target: str
    registers: int
    local: int
    """Bytes of a thread in local memory."""
    shared: int
    """Bytes of a block, those that CUDA keeps for itself included."""
    instructions: int
    """SASS, those of loops once, without padding."""
    wide_loads: int
    """Loads of 16 bytes from global memory; `loads` are all."""
    loads: int
    wide_stores: int
    stores: int
    generic: int
    """Accesses by addresses of which the compiler does not know that they are global memory's."""
    fp64: int
    """Instructions that compute in fp64."""
    faults: str
    nvcc: str


COLUMNS = tuple(field.name for field in fields(Row))


def cuobjdump() -> str | None:
    """The disassembler of the toolkit, or the one that comes with Triton."""
    if found := shutil.which("cuobjdump"):
        return found
    try:
        import triton
    except ImportError:
        return None
    return str(triton.knobs.nvidia.cuobjdump.path)


def compile_source(toolkit: toolchain.CudaToolkit, source: Path, target: int, folder: Path) -> Path:
    """The cubin of a source for ``sm_<target>``."""
    cubin = folder / f"{source.stem}-{target}.cubin"
    command = [toolkit.nvcc, *nvcc.FLAGS, f"-arch=sm_{target}", "-cubin", str(source), "-o", cubin]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{source.name}: {done.stderr}")
    return cubin


def rows_of(
    cubin: Path, disassembler: str, *, source: str, target: int, version: str
) -> Iterator[Row]:
    """A row for each kernel of a cubin."""
    usage, sass = (
        subprocess.run(
            [disassembler, option, str(cubin)], capture_output=True, text=True, check=True
        ).stdout
        for option in ("-res-usage", "-sass")
    )
    resources = {
        name: {key: int(value) for key, value in re.findall(r"\b([A-Z]+)(?:\[0\])?:(\d+)", numbers)}
        for name, numbers in re.findall(r"Function (\w+):\s*\n\s*(REG.*)", usage)
    }
    bodies = re.split(r"^\s*Function : (\w+)$", sass, flags=re.MULTILINE)[1:]
    readable = demangled(bodies[::2])
    for name, body in zip(bodies[::2], bodies[1::2], strict=True):
        yield row(readable[name], body, resources[name], source, target, version)


def row(
    kernel: str, body: str, resources: dict[str, int], source: str, target: int, version: str
) -> Row:
    """What is read from a kernel's machine code."""
    operations = instructions(body)
    loads = [op for op in operations if op.startswith("LDG")]
    stores = [op for op in operations if op.startswith("STG")]
    local = resources["STACK"] + resources["LOCAL"]
    local += sum(op.startswith(("LDL", "STL")) for op in operations)
    made = Row(
        kernel=kernel,
        source=source,
        target=f"sm_{target}",
        registers=resources["REG"],
        local=local,
        shared=resources["SHARED"],
        instructions=len(operations),
        wide_loads=sum(WIDE in op for op in loads),
        loads=len(loads),
        wide_stores=sum(WIDE in op for op in stores),
        stores=len(stores),
        generic=sum(op.split(".")[0] in ("LD", "ST", "ATOM") for op in operations),
        fp64=sum(is_fp64(op) for op in operations),
        faults="",
        nvcc=version,
    )
    return Row(**asdict(made) | {"faults": "; ".join(faults(made))})


def instructions(body: str) -> list[str]:
    """The operations of a disassembled function, in order.

    >>> instructions("  /*0010*/  @!P0 LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;  /* 0x000 */")
    ['LDG.E.128.CONSTANT']
    """
    pattern = r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)"
    found = re.findall(pattern, body, re.MULTILINE)
    return [operation for operation in found if operation != "NOP"]


def is_fp64(operation: str) -> bool:
    """Whether it computes with, or converts to or from, fp64.

    >>> [is_fp64(op) for op in ("DFMA", "F2F.F64.F32", "I2F.F64", "FFMA", "DEPBAR.LE")]
    [True, True, True, False, False]
    """
    return ".F64" in operation or operation.split(".")[0] in (
        "DADD",
        "DMUL",
        "DFMA",
        "DSETP",
        "DMNMX",
    )


def faults(made: Row) -> list[str]:
    """A sentence for each promise that is broken."""
    claim = claim_of(made.kernel)
    if claim is None:
        return ["nothing is claimed of it"]
    found = []
    if made.local:
        found.append(f"{made.local} bytes of local memory and instructions for it")
    if made.registers > claim.registers:
        found.append(f"{made.registers} registers, more than {claim.registers}")
    if made.generic:
        found.append(f"{made.generic} generic accesses")
    if made.wide_loads < claim.wide_loads:
        found.append(f"{made.wide_loads} of {claim.wide_loads} loads of 16 bytes")
    if made.wide_stores < claim.wide_stores:
        found.append(f"{made.wide_stores} of {claim.wide_stores} stores of 16 bytes")
    if made.fp64 and not claim.fp64 and not works_on_fp64(made.kernel):
        found.append(f"{made.fp64} instructions in fp64")
    return found


def claim_of(kernel: str) -> Claim | None:
    """What is promised of a kernel: of its first template argument too, or of all."""
    of = (kernel.split(",")[0], kernel.split("<")[0])
    return next((claim for claim in CLAIMS if claim.kernel in of), None)


def works_on_fp64(kernel: str) -> bool:
    """Whether the template's arguments are for fp64 tensors: doubles, or keys of 64 bits.

    >>> [works_on_fp64(k) for k in ("f<double, float>", "pass_kernel<unsigned long, 0>", "f<float>")]
    [True, True, False]
    """
    arguments = kernel.partition("<")[2]
    return "double" in arguments or "unsigned long" in arguments


def demangled(names: Iterable[str]) -> dict[str, str]:
    """``pass_kernel<unsigned int, 0>`` of a symbol, by symbol."""
    names = list(names)
    text = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout
    return dict(zip(names, map(short, text.splitlines()), strict=True))


def short(name: str) -> str:
    """Without namespaces, casts and parameters.

    >>> short("void granet::cuda::pass_kernel<unsigned int, (granet::Rank)0>(granet::cuda::Selection, bool)")
    'pass_kernel<unsigned int, 0>'
    """
    name = name.replace("(anonymous namespace)::", "")
    name = re.sub(r"\(granet::\w+\)", "", name)
    name = re.sub(r"\(.*\)$", "", name).removeprefix("void ")
    return re.sub(r"\b\w+::", "", name)


def all_rows(targets: Iterable[int], jobs: int, only: Iterable[str] = ()) -> list[Row]:
    """Of every kernel of every source, or of those sources, on every target.

    Raises:
        SystemExit: there is no nvcc or no cuobjdump, or a source does not compile.
    """
    toolkit, reason = toolchain.find_cuda()
    disassembler = cuobjdump()
    if toolkit is None or disassembler is None:
        raise SystemExit(reason or "no cuobjdump on the PATH, and no Triton that brings one")
    wanted = set(only)
    sources = [s for s in nvcc.sources() if not wanted or s.stem in wanted]
    work = [(source, target) for target in targets for source in sources]
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(jobs) as pool:
        folder = Path(name)
        cubins = pool.map(lambda item: compile_source(toolkit, *item, folder), work)
        return [
            made
            for (source, target), cubin in zip(work, cubins, strict=True)
            for made in sorted(
                rows_of(
                    cubin, disassembler, source=source.name, target=target, version=toolkit.version
                ),
                key=lambda made: made.kernel,
            )
        ]


def write_csv(path: Path, rows: Iterable[Row]) -> None:
    """Overwrites."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(made) for made in rows)


def line(made: Row | None = None) -> str:
    """A row as text; the titles for None."""
    shown = ("target", "registers", "shared", "instructions", "loads", "stores", "fp64")
    cells: tuple[object, ...] = ("kernel", *shown)
    if made is not None:
        cells = (
            made.kernel,
            made.target,
            made.registers,
            made.shared,
            made.instructions,
            f"{made.wide_loads}/{made.loads}",
            f"{made.wide_stores}/{made.stores}",
            made.fp64,
        )
    widths = (-52, -6, 9, 6, 12, 8, 8, 5)
    text = (
        f"{cell!s:{'<' if width < 0 else '>'}{abs(width)}}"
        for cell, width in zip(cells, widths, strict=True)
    )
    fault = f"   FAULT: {made.faults}" if made is not None and made.faults else ""
    return "  ".join(text).rstrip() + fault


def main(argv: list[str] | None = None) -> int:
    """Returns 1 where a kernel is not what is promised, 0 otherwise."""
    parser = argparse.ArgumentParser(prog="python -m bench.kernels.cubins", description=__doc__)
    names = [source.stem for source in nvcc.sources()]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="sources")
    parser.add_argument("--target", nargs="+", type=int, choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument(
        "--out", type=Path, help=f"CSV; {OUT}/nvcc-<version>.csv, where everything is compiled"
    )
    args = parser.parse_args(argv)
    rows = all_rows(args.target, args.jobs, args.only)
    print(line())
    for made in rows:
        print(line(made))
    broken = sum(bool(made.faults) for made in rows)
    print(f"{len(rows)} compiled with nvcc {rows[0].nvcc}, {broken} with faults")
    is_all = set(args.only) == set(names) and set(args.target) == set(TARGETS)
    out = args.out or (OUT / f"nvcc-{rows[0].nvcc}.csv" if is_all else None)
    if out is not None:
        write_csv(out, rows)
        print(f"written: {out}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
