"""`granet report --html`: what the page says is what the runs did, and it needs nothing else."""

from __future__ import annotations

import argparse
import csv
import re
import shutil
from pathlib import Path

import pytest

from granet.cli import main
from granet.commands import report
from granet.methods import METHODS
from granet.monitor import LayerChange
from granet.page.figures import mean_of
from granet.page.gather import updates_of
from granet.training import build
from granet.training.train import train
from tests.page_runs import GRANET, NAME, Page, folder, page_of
from tests.tiny_runs import make_network, tiny_config

__all__ = ["folder"]

SECTIONS = ["summary", "curves", "ramp", "layers", "dynamics", "masks", "machine"]
REFERENCE = re.compile(r"https?:|//\w|url\(|@import|<script|<iframe|<object", re.I)


@pytest.fixture(scope="module")
def text(folder: Path) -> str:
    return page_of(folder)


def test_the_command_writes_a_page_with_the_rows_that_it_prints(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "page.html"
    assert main(["report", str(folder), "--html", str(file)]) == 0
    page = Page(file.read_text(encoding="utf-8"))
    assert page.ids == SECTIONS
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    printed = capsys.readouterr().out
    rows = page.table("method")
    assert [row[0] for row in rows] == ["granet", "dense", "snip", "rigl"]
    for row in rows:
        assert re.search(r"\s+".join(map(re.escape, row)), printed)
    assert page_of(folder) == file.read_text(encoding="utf-8")  # the same runs, the same bytes


def test_it_refers_to_nothing_outside(text: str) -> None:
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert {source[:5] for source in sources if not source.startswith("#")} == {"data:"}
    without_pictures = re.sub(r'"data:[^"]*"', "", text)
    assert not REFERENCE.search(without_pictures.replace("<!DOCTYPE html>", ""))
    assert "default-src 'none'" in text


def test_names_are_text(text: str) -> None:
    assert NAME.replace("/", "") not in text
    page = Page(text)
    names = [row[0] for row in page.table("run", last="checkpoint")]
    assert any(name.endswith(NAME.replace("/", "")) for name in names)
    assert not {"b", "i"} & set(re.findall(r"<(\w+)", text))


def test_every_chart_is_there_and_has_a_name(text: str) -> None:
    page = Page(text)
    titles = [svg.get("aria-label", "").split(":")[0] for svg in page.drawings if svg.get("role")]
    assert titles == [
        "Validation accuracy", "Validation accuracy, second half", "Training accuracy",
        "Validation loss", "Training loss", "Learning rate",
        "Sparsity after each update", "Measured minus planned",
        "Density", "Active weights", "Cost",
        "Churn", "Exploration (ITOP rate)", "Survival", "Pruned", "Dropped", "Regrown",
    ]  # fmt: skip
    accuracy = page.drawing("Validation accuracy")
    assert len(accuracy.findall("path[@class='seed c0 d0']")) == 2
    assert len(accuracy.findall("path[@class='line c0 d0']")) == 1
    # Lines end where their runs do, in the words of those who cannot see them too.
    assert f"{GRANET} " in str(accuracy.get("aria-label"))
    told = [title.text or "" for title in accuracy.iter("title")]
    assert told[-1].startswith(f"epoch 4\n{GRANET}: ")


def test_a_deviation_from_the_plan_shows(folder: Path, tmp_path: Path, text: str) -> None:
    rows = Page(text).table("setup", last="difference in weights")
    assert [row[2] for row in rows] == ["0"] * 3
    assert [row[0] for row in rows] == [GRANET, "snip · 0.9", "rigl · 0.9"]
    run = tmp_path / "granet-0"
    shutil.copytree(folder / "granet-0", run)
    with (run / "topology.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    changed = next(row for row in table if row["step"] == "6")
    changed["active"] = str(int(changed["active"]) + 5)
    with (run / "topology.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(changed))
        writer.writeheader()
        writer.writerows(table)
    page = Page(page_of(run))
    assert page.table("setup", last="difference in weights")[0][2] == "5 at step 6"
    told = [title.text or "" for title in page.drawing("Measured minus planned").iter("title")]
    assert "optimizer step 6\ngranet · 0.9: +5" in told


@pytest.mark.parametrize("method", sorted(METHODS))
def test_each_method_keeps_to_its_plan(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "create_model", make_network)
    settings = {"rounds": 2} if method in ("lottery-ticket", "synflow") else {}
    train(tiny_config(tmp_path, method=method, **settings))
    monkeypatch.undo()  # the page makes no network of its own
    [row] = Page(page_of(tmp_path)).table("setup", last="difference in weights")
    assert row[2] == "0"
    assert int(row[1]) > 0


def test_a_run_under_way_does_not_cut_a_mean_short(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "granet-0", tmp_path / "under-way")
    (tmp_path / "under-way" / "summary.yaml").unlink()
    metrics = tmp_path / "under-way" / "metrics.csv"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:2]))
    page = Page(page_of(folder / "granet-0", tmp_path))
    told = [title.text or "" for title in page.drawing("Validation accuracy").iter("title")]
    assert [text.split("\n")[0] for text in told if "granet" in text] == [
        f"epoch {epoch}" for epoch in (1, 2, 3, 4)
    ]


def test_the_layers_are_those_of_the_checkpoint(text: str) -> None:
    page = Page(text)
    rows = page.table("layer", last="rigl · 0.9")
    assert [row[:3] for row in rows] == [
        ["0", "8×1×3×3", "72"],
        ["5", "11×128", "1,408"],
        ["6", "10×11", "110"],
    ]
    granet, dense = ([row[column] for row in rows] for column in (4, 5))
    assert sum(int(cell.split(" ")[0].replace(",", "")) for cell in granet) == 159
    assert dense == ["72 (100 %)", "1,408 (100 %)", "110 (100 %)"]


def test_machine_and_bytes(folder: Path, tmp_path: Path, text: str) -> None:
    page = Page(text)
    costs = {row[0]: row for row in page.table("setup", last="file, bytes")}
    assert costs["dense"][4:6] == ["6,360", "6,360"]
    # 159 weights of 4 bytes; a bit for each of 72, 1,408 and 110
    assert costs[GRANET][4:6] == ["6,360", f"{159 * 4 + 9 + 176 + 14:,}"]
    assert all(row[4] != "not recorded" for row in page.table("run", last="an epoch"))
    old = tmp_path / "old"
    shutil.copytree(folder / "granet-0", old)
    (old / "machine.yaml").unlink()
    (old / "algorithms.csv").unlink()
    page = Page(page_of(old))
    [row] = page.table("run", last="an epoch")
    assert row[1:7] == ["not recorded"] * 6
    assert page.tables[-1][1] == ["0", "not recorded"]


@pytest.mark.parametrize("name", ["dense", "snip", "under-way"])
def test_a_page_of_one_run(folder: Path, name: str) -> None:
    page = Page(page_of(folder / name))
    assert page.ids == SECTIONS


def test_a_dense_run_has_no_masks(folder: Path) -> None:
    text = page_of(folder / "dense")
    for sentence in ("No run is sparse.", "No run has updated its masks.", "No run has masks."):
        assert sentence in text


def test_what_is_missing_leaves_gaps(folder: Path, tmp_path: Path) -> None:
    """A run of which only checkpoints are left."""
    run = tmp_path / "bare"
    run.mkdir()
    shutil.copy(folder / "granet-0" / "last.pt", run)
    page = Page(page_of(run))
    assert page.table("run", last="checkpoint")[0][3] == "unfinished, epoch 0 of 4"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("topology.csv", "step,layer\n1,a\n"),
        ("metrics.csv", "epoch,step\n1,x\n"),
        ("machine.yaml", "- 1"),
    ],
)
def test_a_damaged_file_is_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(folder / "granet-0", run)
    (run / name).write_text(content)
    with pytest.raises(SystemExit) as exit_request:
        main(["report", str(run), "--html", str(tmp_path / "page.html")])
    assert exit_request.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"granet report: error: {run / name}: expected ")
    assert error.count("\n") == 1
    assert not (tmp_path / "page.html").exists()


def test_updates_add_up_their_layers() -> None:
    def row(step: int, layer: str, active: int, **fields: float | None) -> LayerChange:
        counts = dict.fromkeys(("pruned", "dropped", "regrown", "churn", "explored", "survival"), 0)
        return LayerChange(
            step=step, layer=layer, numel=100, active=active, sparsity=0.0, dead_channels=0,
            channels=1, **(counts | fields),
        )  # type: ignore[arg-type]  # fmt: skip

    first, second = updates_of([
        row(2, "a", 40, regrown=10, pruned=1, explored=0.5, survival=None),
        row(2, "b", 10, regrown=2, dropped=3, explored=0.3, survival=None),
        row(4, "a", 40, survival=0.2),
        row(4, "b", 10, survival=0.5),
    ])  # fmt: skip
    assert (first.active, first.sparsity, first.regrown) == (50, 0.75, 12)
    assert (first.pruned, first.dropped, first.churn) == (1, 3, 12 / 50)
    assert first.explored == 0.4
    assert first.survival is None
    assert second.survival == pytest.approx((0.2 * 10 + 0.5 * 2) / 12)


def test_a_mean_is_of_what_all_have() -> None:
    assert mean_of([[(1, 2.0), (2, 4.0)], [(1, 4.0)]]) == [(1, 3.0)]
    assert mean_of([[(1, 2.0)]]) == [(1, 2.0)]


def test_a_run_that_averages_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its network is the average; what computed its layers is told of training."""
    monkeypatch.setattr(build, "create_model", make_network)
    train(tiny_config(tmp_path, model_ema=True, model_ema_decay=0.5))
    page = Page(page_of(tmp_path))
    rows = page.table("layer", last="granet · 0.9")
    assert sum(int(row[4].split(" ")[0]) for row in rows) == 159
    [machine] = page.table("run", last="an epoch")
    if machine[2].startswith("cpp"):
        assert "not recorded" not in {row[1] for row in page.tables[-1]}
