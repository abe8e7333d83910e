"""A kernel's code for a target, and the facts that are read from it: in PTX, and in SASS.

`cuobjdump` comes with Triton; nothing else is needed, a GPU least of all.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.kernels.launches import Specialization

WIDE = 16
"""Bytes of the widest access that all targets have; sm_100 has one of 32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Code:
    """Facts about compiled code."""

    registers: int
    """Of a thread."""
    local: int
    """Bytes of local memory of a thread: stack, and what did not fit into registers."""
    spills: int
    """Instructions that access it."""
    shared: int
    """Bytes of shared memory of a program."""
    instructions: int
    """Of the machine, with those of loops once; without padding."""
    fp64: tuple[str, ...]
    """PTX instructions that work on fp64 numbers, each once."""
    loads: Counter[int]
    """Loads from global memory, by their bytes in a thread."""
    stores: Counter[int]
    """Stores to it."""
    fused: int
    """Products and sums that are rounded once."""
    misplaced_masks: int
    """Histograms whose mask may lie in another order than what they count: see `misplaced_masks`."""
    threads: int
    """Of a program."""

    def bytes_by(self, accesses: Counter[int], width: int) -> int:
        """What those among the accesses that are at least so wide move for a program."""
        return self.threads * sum(size * n for size, n in accesses.items() if size >= width)


def compile_for(specialization: Specialization, capability: int) -> Code:
    """Compile for ``sm_<capability>``; Triton keeps the result in its cache."""
    source = ASTSource(
        fn=specialization.kernel,
        signature=specialization.signature,
        constexprs=specialization.constants,
        attrs=specialization.attributes,
    )
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options=specialization.options)
    usage, machine = disassemble(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    return Code(
        registers=usage["REG"],
        local=usage["STACK"] + usage["LOCAL"],
        spills=sum(op.startswith(("LDL", "STL")) for op in machine),
        shared=compiled.metadata.shared,
        instructions=len(machine),
        fp64=tuple(sorted(set(re.findall(r"^\s*(?:@!?%p\d+ )?(\w\S*\.f64\S*)", ptx, re.M)))),
        loads=global_accesses(ptx, "ld"),
        stores=global_accesses(ptx, "st"),
        fused=len(re.findall(r"^\s*(?:@!?%p\d+ )?fma\.", ptx, re.M)),
        misplaced_masks=misplaced_masks(compiled.asm["ttgir"]),
        threads=32 * compiled.metadata.num_warps,
    )


def global_accesses(ptx: str, kind: str) -> Counter[int]:
    """How many ``ld`` or ``st`` of global memory there are, by their bytes.

    >>> global_accesses("  @%p1 ld.global.L1::evict_first.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 ];", "ld")
    Counter({16: 1})
    """
    pattern = rf"^\s*(?:@!?%p\d+\s+)?{kind}\.(\S*\bglobal\b\S*)"
    found: Counter[int] = Counter()
    for operation in re.findall(pattern, ptx, re.M):
        parts = operation.split(".")
        vector = next((int(part[1:]) for part in parts if re.fullmatch(r"v\d", part)), 1)
        bits = int(re.sub(r"\D", "", parts[-1]))
        found[vector * bits // 8] += 1
    return found


def misplaced_masks(ttgir: str) -> int:
    """How many histograms have a mask that is not made from their very source, by comparing it.

    Triton takes the order of a histogram's source for indifferent and reorders it as it likes, but not the
    mask with it, so that digits are counted under other elements' bits.

    >>> misplaced_masks("%c = tt.histogram %a, %b : tensor<8xi32>")
    1
    >>> misplaced_masks("%b = arith.cmpi sge, %a, %z : x \\n %c = tt.histogram %a, %b : y")
    0
    """
    masked = re.findall(r"tt\.histogram (%\w+), (%\w+)", ttgir)
    return sum(
        re.search(rf"{mask} = arith\.cmpi \w+, {source}\b", ttgir) is None
        for source, mask in masked
    )


def disassemble(cubin: bytes) -> tuple[dict[str, int], list[str]]:
    """Resources (REG, STACK, LOCAL …) and machine instructions of an object with one kernel."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        usage, sass = (
            subprocess.run(
                [triton.knobs.nvidia.cuobjdump.path, option, path],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            for option in ("-res-usage", "-sass")
        )
    resources = {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", usage)}
    code = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass, re.M)
    return resources, [operation for operation in code if operation != "NOP"]
