"""Benchmarks on the CPU: each kernel beside what it replaces, in turn, in one process.

`make bench-cpu` runs them (pytest-benchmark drives every measurement), prints one table against the
targets in `targets.py` and writes it as CSV. `bench/README.md` says how to read it.
"""
