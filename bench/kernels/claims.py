"""What is promised of compiled code, and whether it holds.

Width: where elements lie at multiples of 16 bytes, everything that is read and written of them goes by
16 bytes an access, but for an incomplete group of eight at the end; of bools by a group's 8, and in
whole groups only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import triton.language as tl

from bench.kernels.compile import WIDE, Code
from bench.kernels.launches import Specialization
from granet_kernels.backends.triton.launch import GROUP
from granet_kernels.backends.triton.select_keys import BLOCK

SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
SHARED_LIMIT_OF_OTHERS = 99 << 10
"""Bytes that a program may have; the CUDA C++ Programming Guide's table of compute capabilities."""

UNUSED_STACK = 8
"""Bytes that ptxas reserves in one kernel for sm_100, and no instruction accesses."""

MASK_BYTES = 1 / 8
"""Bytes of mask for each element."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """What a program moves of its elements where all are active, in bytes an element."""

    elements: int
    """Of a program, or of one turn of its loop."""
    loads: float
    stores: float
    width: int
    """Bytes that every access to them has at least; 0 where nothing is promised."""
    others: float = 0
    """Loads, and stores likewise, that are as wide but not of elements."""


def size_of(dtype: tl.dtype) -> int:
    """Bytes of an element."""
    return int(dtype.primitive_bitwidth) // 8


def pointee(made: Specialization, name: str) -> int:
    """Bytes of what an argument points to, from its type: 2 of ``*bf16``."""
    digits = "".join(c for c in made.signature[name] if c.isdigit())
    return max(int(digits) // 8, 1)


def is_aligned(made: Specialization, *names: str) -> bool:
    """Whether arguments are known to point at multiples of 16 bytes."""
    places = [(made.kernel.arg_names.index(name),) for name in names]
    return all(["tt.divisibility", 16] in made.attributes.get(place, []) for place in places)


def of_pack(made: Specialization) -> Traffic:
    wide = made.constant("WHOLE") and is_aligned(made, "mask")
    return Traffic(made.constant("GROUPS") * GROUP.value, 1, 0, GROUP.value if wide else 0)


def of_unpack(made: Specialization) -> Traffic:
    wide = made.constant("WHOLE") and is_aligned(made, "mask")
    return Traffic(made.constant("GROUPS") * GROUP.value, 0, 1, GROUP.value if wide else 0)


def of_count(made: Specialization) -> Traffic:
    wide = made.constant("WHOLE") and made.constant("ALIGNED")
    return Traffic(made.constant("CHUNK"), 1, 0, WIDE if wide else 0)


def of_zero_inactive(made: Specialization) -> Traffic:
    size = size_of(made.constant("BITS"))
    wide = made.constant("ALIGNED")
    return Traffic(made.constant("GROUPS") * GROUP.value, size, size, WIDE if wide else 0)


def of_cast(made: Specialization) -> Traffic:
    wide = is_aligned(made, "source", "target")
    sizes = pointee(made, "source"), pointee(made, "target")
    return Traffic(made.constant("GROUPS") * GROUP.value, *sizes, WIDE if wide else 0)


def of_gather(made: Specialization) -> Traffic:
    sizes = pointee(made, "source"), pointee(made, "target")
    return Traffic(made.constant("GROUPS") * GROUP.value, *sizes, 0)  # reads where it must


def of_sgd(made: Specialization) -> Traffic:
    param = size_of(made.constant("PARAM"))
    speed = 0 if made.is_constant("momentum") else size_of(made.constant("SPEED"))
    average = 0 if made.is_constant("share") else max(param, size_of(tl.float32))
    elements = made.constant("GROUPS") * GROUP.value
    width = WIDE if made.constant("ALIGNED") else 0
    return Traffic(elements, 2 * param + speed + average, param + speed + average, width)


def of_digits(made: Specialization) -> Traffic:
    """A launch that counts: the last program reads and clears the histogram, 16 bytes at once if long."""
    keys = of_keys(made)
    values = made.constant("VALUES")
    others = 8 * values / keys.elements if values > 32 * made.options["num_warps"] else 0
    return replace(keys, others=others)


def of_keys(made: Specialization) -> Traffic:
    by = made.constant("BY")
    width = WIDE if by.aligned and by.whole else 0
    lists = made.constant("ZEROED") if "ZEROED" in made.kernel.arg_names else ()
    zeroed = sum(size_of(integer) for _, integer in lists)
    return Traffic(BLOCK.value, size_of(by.dtype) + zeroed, zeroed, width)


TRAFFIC: dict[str, Callable[[Specialization], Traffic | None]] = {
    "_pack_kernel": of_pack,
    "_unpack_kernel": of_unpack,
    "_count_kernel": of_count,
    "_zero_inactive_kernel": of_zero_inactive,
    "_mask_cast_kernel": of_cast,
    "_mask_gather_kernel": of_gather,
    "_masked_sgd_kernel": of_sgd,
    "_first_digit_kernel": of_digits,
    "_narrow_kernel": of_digits,
    "_settle_kernel": of_keys,
    # These write tables: some kilobytes.
    "_own_kernel": lambda made: None,
    "_write_kernel": lambda made: None,
}
"""By kernel; None where nothing is moved for each element."""


def traffic(made: Specialization) -> Traffic | None:
    """Of a kernel; None where it moves nothing for each element."""
    return TRAFFIC[made.name](made)


DROPPED = ("cvt.rn.f64.s64", "cvt.rpi.f64.f64", "cvt.rzi.s64.f64", "min.f64", "mul.rn.f64")
DROPPED += ("selp.f64", "setp.gt.f64")
"""What ceil(p * active) of a segment takes, an fp64 product by definition; none reads an fp32 number."""


def unasked_fp64(made: Specialization, code: Code) -> list[str]:
    """Instructions on fp64 numbers where no tensor of the call is fp64, nor the fraction to be dropped."""
    if "float64" in made.call:
        return []
    is_fraction = made.name == "_first_digit_kernel" and not made.is_constant("dropped")
    return [op for op in code.fp64 if not (is_fraction and op in DROPPED)]


def faults(made: Specialization, code: Code, capability: int) -> list[str]:
    """A sentence for each promise that is broken."""
    found = []
    if code.spills or code.local > UNUSED_STACK:
        found.append(f"{code.local} bytes of local memory, {code.spills} instructions for it")
    limit = SHARED_LIMIT.get(capability, SHARED_LIMIT_OF_OTHERS)
    if code.shared > limit:
        found.append(f"{code.shared} bytes of shared memory, more than {limit}")
    if unasked := unasked_fp64(made, code):
        found.append(f"fp64: {', '.join(unasked)}")
    if made.options.get("enable_fp_fusion") is not False:
        found.append("enable_fp_fusion is left to Triton")
    if code.misplaced_masks:
        found.append(f"{code.misplaced_masks} histograms with a mask of another order")
    moved = traffic(made)
    if moved is not None and moved.width:
        for name, accesses, least in (
            ("loads", code.loads, moved.loads),
            ("stores", code.stores, moved.stores),
        ):
            wide = code.bytes_by(accesses, moved.width) / moved.elements - moved.others
            if wide < least:
                sizes = ", ".join(f"{n} of {size}" for size, n in sorted(accesses.items()))
                found.append(
                    f"{wide:g} of {least:g} bytes an element in {name} of {moved.width} bytes ({sizes})"
                )
    return found
