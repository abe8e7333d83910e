"""What malloc does with memory that has been freed."""

from __future__ import annotations

import ctypes

# Of glibc's <malloc.h>.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_NEVER = -1


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees, from one training step to the next; for glibc.

    A block that fits no free piece of glibc's heap and is larger than a threshold, of at most 32 MiB,
    comes from the system and goes back to it when it is freed; so does the end of the heap, when much of
    it is free. The system clears every page before it hands it out again, and a training step allocates
    its activations anew. Large outputs and gradients of this library's sparse layers have memory that is
    kept anyway; this is for all other tensors. What it gains depends on what room the heap has by itself,
    from nothing to half of a dense layer's time: docs/performance.md, "Memory that is kept".

    Call it before the first large tensor: blocks that came from the system before still go back to it.
    It holds for good, and for blocks of the main thread; other threads have heaps of 64 MiB at most, and
    what does not fit those still comes from the system. Processes that are started do not inherit it;
    they do inherit environment variables that do the same, ``MALLOC_MMAP_MAX_=0`` and
    ``MALLOC_TRIM_THRESHOLD_=68719476736``, which also serve programs that cannot be changed. Resident
    memory stays at its peak, which free pieces that are too small to be used again can raise.

    Returns:
        Whether the C library has taken both settings. False where it has no ``mallopt`` (musl, macOS,
        Windows), or refused one; the other then holds. True says nothing of another allocator that is
        preloaded (jemalloc, tcmalloc): such have settings of their own.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # TypeError: Windows wants a name
        return False
    mallopt.argtypes = (ctypes.c_int, ctypes.c_int)
    mallopt.restype = ctypes.c_int
    taken = [mallopt(_M_MMAP_MAX, 0), mallopt(_M_TRIM_THRESHOLD, _NEVER)]
    return all(taken)
