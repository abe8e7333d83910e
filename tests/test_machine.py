"""What a run records of its machine, and of the kernels that compute its layers."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import pytest
import torch

from granet.training.build import choose_device
from granet.training.checkpoint import load_checkpoint
from granet.training.machine import (
    AlgorithmWatch,
    Machine,
    append_machine,
    read_machines,
    this_machine,
)
from granet.training.stopping import Stopped
from granet.training.train import train
from granet_kernels import MaskedLinear, available_backends, use_backend
from granet_kernels.choices import choice_of
from tests.tiny_runs import tiny, tiny_config

__all__ = ["tiny"]

MACHINE = Machine(
    step=0, device="cuda:0", device_name="a card", backend="cuda", cpu_kernels=None, threads=4, processes=1,
    torch="2.10", python="3.11.0", granet_kernels="0.1.0",
)  # fmt: skip


def test_a_start_at_an_earlier_step_replaces_those_after_it(tmp_path: Path) -> None:
    path = tmp_path / "machine.yaml"
    assert read_machines(path) == []
    starts = [dataclasses.replace(MACHINE, step=step, threads=step + 1) for step in (0, 5, 9, 5)]
    for start in starts:
        append_machine(path, start)
    assert read_machines(path) == [starts[0], starts[3]]


@pytest.mark.parametrize("text", ["- device: cpu\n", "- 1\n", "5\n", "a: [", ""])
def test_another_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "machine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"machine\.yaml: expected the machines of a granet run"):
        read_machines(path)


def test_this_machine_names_the_backend_that_is_chosen() -> None:
    cpu = torch.device("cpu")
    with use_backend("reference"):
        machine = this_machine(cpu, step=3, is_masked=True)
        assert (machine.step, machine.device, machine.backend) == (3, "cpu", "reference")
        assert machine.cpu_kernels is None
        assert machine.threads == torch.get_num_threads()
    if "cpp" in available_backends():
        kernels = this_machine(cpu, step=0, is_masked=True).cpu_kernels
        assert kernels in ("portable", "avx2", "avx512")
    assert this_machine(cpu, step=0, is_masked=False).backend is None


def test_a_change_of_algorithm_is_told_once() -> None:
    layers = {"a": MaskedLinear(2, 2), "b": MaskedLinear(2, 2)}
    watch = AlgorithmWatch(layers)
    assert watch.changes(1) == []
    choice_of(layers["a"].packed_mask).last = "dense"
    assert [(c.epoch, c.layer, c.algorithm) for c in watch.changes(2)] == [(2, "a", "dense")]
    assert watch.changes(3) == []
    choice_of(layers["a"].packed_mask).last = "sparse"
    assert [c.algorithm for c in watch.changes(4)] == ["sparse"]


def test_a_run_records_each_start_and_its_layers_algorithms(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    with pytest.raises(Stopped):
        train(config, stop_after=7)
    train(config, resume=load_checkpoint(tmp_path / "run" / "last.pt"))
    machines = read_machines(tmp_path / "run" / "machine.yaml")
    assert [machine.step for machine in machines] == [0, 7]
    assert {machine.device for machine in machines} == {str(choose_device("auto"))}
    with (tmp_path / "run" / "algorithms.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    if machines[0].backend == "cpp":
        assert {row["layer"] for row in rows} == {"0", "5", "6"}
        assert {row["algorithm"] for row in rows} <= {"sparse", "dense"}
        assert rows[0]["epoch"] == "1"


def test_a_dense_run_has_no_backend(tmp_path: Path) -> None:
    train(tiny_config(tmp_path, method="dense", epochs=1))
    [machine] = read_machines(tmp_path / "run" / "machine.yaml")
    assert machine.backend is None
