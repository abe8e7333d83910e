"""What Nsight Compute counted, put beside our accounts."""

import csv
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # last: `bench` is not installed, everything else is

import bench.yardsticks  # noqa: E402, F401 (registers the rows)
from bench import dram, registry  # noqa: E402

HEADER = ("ID", "Kernel Name", "Metric Name", "Metric Unit", "Metric Value")


def report(path, kernels):
    """As ncu writes it: its own words, then a line for each kernel and metric."""
    with path.open("w", newline="") as file:
        file.write("==PROF== Connected to process 1\n")
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        writer.writerow(HEADER)
        for i, (name, *values) in enumerate(kernels):
            for metric, unit, value in zip(
                dram.METRICS, ("byte", "byte", "ns"), values, strict=True
            ):
                writer.writerow((i, name, metric, unit, value))


def test_kernels_belong_to_the_marker_before_them(tmp_path):
    marker = ("spin_kernel(long)", "0", "0", "1,000")
    kernels = [("first", "1,000", "20", "3,000"), ("second", "1", "2", "4,000")]
    report(tmp_path / "ncu.csv", [("before", "9", "9", "9"), marker, *kernels, marker])
    operations = [
        dram.Operation(name="a", variant="ours", sparsity=0.9, model_bytes=2046),
        dram.Operation(name="b", variant="theirs", sparsity=None, model_bytes=0),
    ]
    dram._write(tmp_path / "operations.csv", dram.Operation, operations)
    arguments = [str(tmp_path / name) for name in ("ncu.csv", "operations.csv")]
    assert dram.main(["table", *arguments, "--out", str(tmp_path / "dram.csv")]) == 0
    with (tmp_path / "dram.csv").open() as file:
        first, second = csv.DictReader(file)
    assert (first["kernels"], first["microseconds"]) == ("2", "7.0")
    assert (first["dram_read"], first["dram_written"]) == ("1001", "22")
    assert (first["dram_over_model"], first["sparsity"]) == ("0.5", "0.9")
    assert (second["kernels"], second["dram_over_model"]) == ("0", "0.0")


def test_every_pattern_names_a_row():
    for pattern in dram.ROWS:
        assert registry.select(registry.registered(), only=[pattern]), pattern
