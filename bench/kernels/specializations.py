"""The calls that are compiled: every operator with each dtype, each flag, and any memory.

What they launch is the list of specializations. A kernel that none of them launches fails a test.
"""

from __future__ import annotations

import functools
import itertools
import pkgutil
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from bench.kernels.launches import Specialization, launches
from granet_kernels.backends import triton as operators
from granet_kernels.backends.triton import table
from granet_kernels.backends.triton.launch import DTYPES
from granet_kernels.layout import packed_length

WHOLE, RAGGED = 4096, 4099
"""Elements: a multiple of eight, as nearly all weights have, and not one."""

Calls = Iterator[tuple[str, Callable[[], object]]]

SGD = {
    "lr": 0.1,
    "momentum": 0.9,
    "dampening": 0.0,
    "weight_decay": 1e-4,
    "nesterov": False,
    "maximize": False,
    "first": False,
}
SGD_FLAGS: dict[str, dict[str, Any]] = {
    "momentum": {},
    "first": {"first": True},
    "nesterov": {"nesterov": True},
    "maximize": {"maximize": True},
    "dampening": {"dampening": 0.1},
    "no decay": {"weight_decay": 0.0},
    "no momentum": {"momentum": 0.0},
    "lr tensor": {"lr_tensor": torch.ones(())},
    "average": {"average_decay": 0.999},
    "average, no momentum": {"average_decay": 0.999, "momentum": 0.0},
    "scaled": {"grad_scale": torch.ones(()), "found_inf": torch.zeros(())},
}


def short(dtype: torch.dtype) -> str:
    """``float32`` of ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def tensor(numel: int, dtype: torch.dtype, offset: int = 0) -> Tensor:
    """Memory without contents; an offset puts it at an address that 16 does not divide."""
    return torch.empty(numel + offset, dtype=dtype)[offset:]


def mask(numel: int, offset: int = 0) -> Tensor:
    """A packed mask without contents."""
    return tensor(packed_length(numel), torch.uint8, offset)


def memories() -> Iterator[tuple[str, int, int]]:
    """A name, elements and offset: what an access's width depends on."""
    yield "", WHOLE, 0
    yield ", ragged", RAGGED, 0
    yield ", unaligned", WHOLE, 1


def mask_calls() -> Calls:
    for where, numel, offset in memories():
        yield (
            f"pack_mask{where}",
            functools.partial(operators.pack_mask, tensor(numel, torch.bool, offset)),
        )
        yield (
            f"unpack_mask{where}",
            functools.partial(operators.unpack_mask, mask(numel, offset), numel),
        )
        yield (
            f"count_active{where}",
            functools.partial(operators.count_active, [mask(numel, offset)]),
        )
        for dtype in DTYPES:
            call = functools.partial(
                operators.zero_inactive_, [tensor(numel, dtype, offset)], [mask(numel)]
            )
            yield f"zero_inactive_ {short(dtype)}{where}", call


def cast_calls() -> Calls:
    dense = torch.zeros((), dtype=torch.bool)
    usual = ((torch.float32, torch.float32), (torch.float32, torch.bfloat16))
    for source, target in itertools.product(DTYPES, DTYPES):
        where_for = memories() if (source, target) in usual else [("", WHOLE, 0)]
        for where, numel, offset in where_for:
            weight = tensor(numel, source, offset)
            call = functools.partial(operators.mask_cast, weight, mask(numel), target)
            yield f"mask_cast {short(source)} to {short(target)}{where}", call
            if target in (source, torch.float32):
                like = tensor(numel, target)
                call = functools.partial(operators.mask_grad, weight, like, mask(numel), dense)
                yield f"mask_grad {short(source)} to {short(target)}{where}", call
    for source, target in ((torch.float32, torch.float32), (torch.bfloat16, torch.float32)):
        like = torch.empty(64, 32, 3, 3, dtype=target).to(memory_format=torch.channels_last)
        turned = torch.empty(64, 32, 3, 3, dtype=source)
        call = functools.partial(operators.mask_grad, turned, like, mask(like.numel()), dense)
        yield f"mask_grad {short(source)} to {short(target)}, other order", call
    with torch.device("meta"):  # 4 GiB that nobody needs
        like, turned = torch.empty(1 << 15, 1 << 15), torch.empty(1 << 15, 1 << 15).t()
        call = functools.partial(operators.mask_grad, turned, like, mask(like.numel()), dense)
        yield "mask_grad float32 to float32, other order, more than 2^30 elements", call


def sgd_calls() -> Calls:
    def call(dtype: torch.dtype, momentum_dtype: torch.dtype, offset: int, **flags: Any) -> object:
        options = SGD | flags
        param, grad = tensor(RAGGED, dtype, offset), tensor(RAGGED, dtype)
        momenta = [tensor(RAGGED, momentum_dtype)] if options["momentum"] else []
        if "average_decay" in options:
            options |= {"averages": [tensor(RAGGED, torch.promote_types(dtype, torch.float32))]}
        return operators.masked_sgd_([param], [grad], momenta, [mask(RAGGED)], **options)

    for dtype in DTYPES:
        for flag, options in SGD_FLAGS.items():
            label = f"masked_sgd_ {short(dtype)}, {flag}"
            yield label, functools.partial(call, dtype, dtype, 0, **options)
        yield (
            f"masked_sgd_ {short(dtype)}, unaligned",
            functools.partial(call, dtype, dtype, 1),
        )
    for dtype in (torch.bfloat16, torch.float16):
        label = f"masked_sgd_ {short(dtype)}, momentum float32"
        yield label, functools.partial(call, dtype, torch.float32, 0)
        yield (
            f"{label}, average",
            functools.partial(call, dtype, torch.float32, 0, average_decay=0.999),
        )


def select_calls() -> Calls:
    def prune(numel: int, dtype: torch.dtype, offset: int, has_momenta: bool) -> object:
        momenta = [tensor(numel, dtype, offset)] if has_momenta else []
        k = torch.ones(1, dtype=torch.int64)
        return operators.prune_([tensor(numel, dtype, offset)], [mask(numel)], k, momenta)

    def drop_regrow(numel: int, dtype: torch.dtype, offset: int, has_momenta: bool) -> object:
        momenta = [tensor(numel, dtype, offset)] if has_momenta else []
        lists = [tensor(numel, dtype, offset)], [mask(numel)], [tensor(numel, dtype, offset)]
        return operators.drop_regrow_(*lists, torch.tensor(0.5, dtype=torch.float64), momenta)

    def topk(numel: int, dtype: torch.dtype, offset: int) -> object:
        return operators.topk_mask([tensor(numel, dtype, offset)], torch.ones(1, dtype=torch.int64))

    for dtype in DTYPES:
        where_for = memories() if dtype == torch.float32 else [("", WHOLE, 0)]
        for where, numel, offset in where_for:
            place = (numel, dtype, offset)
            label = f"{short(dtype)}{where}"
            yield f"prune_ {label}", functools.partial(prune, *place, True)
            yield f"drop_regrow_ {label}", functools.partial(drop_regrow, *place, True)
            yield f"topk_mask {label}", functools.partial(topk, *place)
    yield "prune_ float32, no momenta", functools.partial(prune, WHOLE, torch.float32, 0, False)
    label = "drop_regrow_ float32, no momenta"
    yield label, functools.partial(drop_regrow, WHOLE, torch.float32, 0, False)
    of_two = [tensor(WHOLE, torch.float32), tensor(WHOLE, torch.bfloat16)]
    yield (
        "topk_mask float32 and bfloat16",
        functools.partial(operators.topk_mask, of_two, torch.ones(1, dtype=torch.int64)),
    )


def table_calls() -> Calls:
    addresses = [[0] * 3]
    captured = functools.partial(
        table._written, torch.device("cpu"), [RAGGED] * 3, addresses, WHOLE, (), captured=True
    )
    yield "a table, in a CUDA graph", captured


CALLS: dict[str, Callable[[], Calls]] = {
    "mask": mask_calls,
    "cast": cast_calls,
    "sgd": sgd_calls,
    "select": select_calls,
    "table": table_calls,
}
"""By family."""


def specializations(families: tuple[str, ...] = tuple(CALLS)) -> list[Specialization]:
    """All that the calls of these families launch: the same list whenever it is asked for in a process."""
    table._tables.clear()  # a table that is there already launches nothing,
    table._load_write_kernel.cache_clear()  # nor does a kernel that has been loaded
    return launches(itertools.chain.from_iterable(CALLS[family]() for family in families))


def kernels() -> set[str]:
    """The names of all kernels of the backend."""
    found = set()
    for module in pkgutil.iter_modules(operators.__path__, f"{operators.__name__}."):
        values = vars(import_module(module.name)).values()
        found |= {value.fn.__name__ for value in values if isinstance(value, JITFunction)}
    return {name for name in found if name.endswith("_kernel")}
