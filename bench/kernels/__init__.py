"""Every Triton kernel, compiled for GPUs that need not be here, and what the machine code looks like.

`python -m bench.kernels` prints a table and fails where code is not what the kernels promise: wide
accesses, nothing in fp64 that is not fp64, nothing spilled.
"""
