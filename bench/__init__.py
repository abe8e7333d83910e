"""Benchmarks: what our kernels are measured against, and with what.

`bench/gpu_suite.sh` is the one command for a machine with an NVIDIA GPU; `python -m bench` is the
program it calls. `bench/README.md` says what each column of the CSV means and how to add a row.
"""
