"""Triton's interpreter in half of its time: it replaces Triton's functions in each call of a device function.

All that they are replaced by is there already, by the kernel that calls or an earlier call.
"""

import inspect

import triton.language as tl
from triton.runtime import interpreter

replace_all = interpreter._patch_lang


def replace_if_needed(function):
    """What is returned restores the originals, for whoever replaced them."""
    modules = [m for m in function.__globals__.values() if inspect.ismodule(m)]
    if any(tl.core.is_builtin(m.load) for m in modules if m in (tl, tl.core)):
        return replace_all(function)
    return interpreter._LangPatchScope()


interpreter._patch_lang = replace_if_needed
