"""Freed memory that a process keeps: counted by its page faults, in a process of its own."""

import ctypes
import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest

from granet_kernels import heap

needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")

# Two tensors of 64 MB at a time, as activations of a step, one of which is freed before the other.
STEPS = """
import resource, sys
import torch
import granet_kernels

if sys.argv[1] == "kept":
    assert granet_kernels.keep_freed_memory()

def step():
    first, second = torch.ones(1 << 24), torch.ones(1 << 24)
    del first
    return second.sum().item()

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def faults_of_a_step():
    before = faults()
    step()
    return faults() - before

# The heap grows in the first steps, and once in a while later.
print(sorted(faults_of_a_step() for _ in range(21))[10])
"""
SETTINGS = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")  # that would hide what is tested


def faults_of_a_step(memory):
    plain = {n: v for n, v in os.environ.items() if not n.startswith(SETTINGS)}
    command = [sys.executable, "-c", STEPS, memory]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=plain)
    return int(done.stdout)


@needs_glibc
def test_kept_memory_is_not_cleared_again():
    kept, freed = faults_of_a_step("kept"), faults_of_a_step("freed")
    assert kept < 20 < freed  # 0, and 64 in pages of 2 MiB, 32,770 in small ones


def test_a_c_library_without_the_setting(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace())
    assert heap.keep_freed_memory() is False


def test_a_system_that_wants_a_librarys_name(monkeypatch):
    def refuse(name):
        raise TypeError("bad argument type for built-in operation")

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    assert heap.keep_freed_memory() is False


@pytest.mark.parametrize("refused", [heap._M_MMAP_MAX, heap._M_TRIM_THRESHOLD])
def test_a_refused_setting_is_told(monkeypatch, refused):
    refusing = SimpleNamespace(mallopt=lambda parameter, value: int(parameter != refused))
    monkeypatch.setattr(ctypes, "CDLL", lambda _: refusing)
    assert heap.keep_freed_memory() is False
