"""The table of all specializations on all targets, printed and kept as CSV."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import triton

from bench.kernels.claims import MASK_BYTES, faults, traffic
from bench.kernels.compile import WIDE, compile_for
from bench.kernels.launches import Specialization
from bench.kernels.specializations import CALLS, specializations


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line of the CSV."""

    kernel: str
    call: str
    """The operator's call that launches it."""
    target: str
    warps: int
    registers: int
    local: int
    shared: int
    instructions: int
    wide_loads: int
    """PTX loads of 16 bytes or more; `loads` are all of them."""
    loads: int
    wide_stores: int
    stores: int
    bytes_per_element: float | None
    """Of elements and mask, read and written, by construction; None where there are none."""
    faults: str
    triton: str


PARTS = 32
"""Into which a target's work is cut; more than there are processors, since some take longer."""

COLUMNS = tuple(field.name for field in fields(Row))


def row(made: Specialization, capability: int) -> Row:
    """Compile and read."""
    code = compile_for(made, capability)
    moved = traffic(made)
    return Row(
        kernel=made.name,
        call=made.call,
        target=f"sm_{capability}",
        warps=code.threads // 32,
        registers=code.registers,
        local=code.local,
        shared=code.shared,
        instructions=code.instructions,
        wide_loads=sum(n for size, n in code.loads.items() if size >= WIDE),
        loads=sum(code.loads.values()),
        wide_stores=sum(n for size, n in code.stores.items() if size >= WIDE),
        stores=sum(code.stores.values()),
        bytes_per_element=None if moved is None else moved.loads + moved.stores + MASK_BYTES,
        faults="; ".join(faults(made, code, capability)),
        triton=triton.__version__,
    )


def rows_of(families: tuple[str, ...], capability: int, part: int, parts: int) -> list[Row]:
    """Every ``parts``-th row of these families on one target, from ``part`` on."""
    return [row(made, capability) for made in specializations(families)[part::parts]]


def all_rows(
    families: Sequence[str], targets: Sequence[int], jobs: int, say: Callable[[Row], None]
) -> list[Row]:
    """Every specialization on every target, by several processes; they are said in their order."""
    rows = []
    work = [(tuple(families), target, part, PARTS) for target in targets for part in range(PARTS)]
    with ProcessPoolExecutor(jobs) as pool:
        done = pool.map(rows_of, *zip(*work, strict=True))
        for _ in targets:
            parts = itertools.zip_longest(*(next(done) for _ in range(PARTS)))
            for made in itertools.chain.from_iterable(parts):
                if made is not None:
                    say(made)
                    rows.append(made)
    return rows


def write_csv(path: Path, rows: Iterable[Row]) -> None:
    """Overwrites."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(made) for made in rows)


SHOWN = ("call", "target", "registers", "shared", "instructions", "loads", "stores", "bytes")


def line(made: Row | None = None) -> str:
    """A row as text; the titles for None."""
    cells: tuple[object, ...] = ("kernel", *SHOWN)
    if made is not None:
        moved = "" if made.bytes_per_element is None else f"{made.bytes_per_element:g}"
        cells = (
            made.kernel.strip("_").removesuffix("_kernel"),
            made.call,
            made.target,
            made.registers,
            made.shared,
            made.instructions,
            f"{made.wide_loads}/{made.loads}",
            f"{made.wide_stores}/{made.stores}",
            moved,
        )
    widths = (-14, -52, -6, 9, 6, 12, 8, 8, 8)
    text = (
        f"{cell!s:{'<' if width < 0 else '>'}{abs(width)}}"
        for cell, width in zip(cells, widths, strict=True)
    )
    fault = f"   FAULT: {made.faults}" if made is not None and made.faults else ""
    return "  ".join(text).rstrip() + fault


def summary(rows: Sequence[Row]) -> str:
    """Of each kernel the most that any of its specializations needs."""
    lines = ["", "the most of each kernel, on any target:"]
    for kernel in dict.fromkeys(made.kernel for made in rows):
        of_kernel = [made for made in rows if made.kernel == kernel]
        worst = max(of_kernel, key=lambda made: made.registers)
        most = {
            name: max(getattr(made, name) for made in of_kernel)
            for name in ("local", "shared", "instructions")
        }
        text = ", ".join(f"{value} {name}" for name, value in most.items())
        lines.append(
            f"  {kernel:22} {worst.registers:3} registers ({worst.call}, {worst.target}), {text}"
        )
    broken = [made for made in rows if made.faults]
    lines.append(
        f"{len(rows)} compiled with Triton {triton.__version__}, {len(broken)} with faults"
    )
    lines += [f"  {made.kernel} ({made.call}, {made.target}): {made.faults}" for made in broken]
    return "\n".join(lines)


__all__ = ["CALLS", "all_rows", "line", "rows_of", "summary", "write_csv"]
