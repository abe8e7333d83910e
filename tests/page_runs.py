"""Runs for a page, trained once for a file of tests; and a page taken apart."""

from __future__ import annotations

import functools
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest

from granet.commands import report
from granet.page.document import render
from granet.training import build, runs
from granet.training.stopping import Stopped
from granet.training.train import train
from tests.tiny_runs import make_network, tiny_config

NAME = """<b>&"it's"</b>"""
"""Of a run directory, as far from plain as a file system allows."""


GRANET = "granet · 0.9 · prune_end 8"
"""What the page calls the first setup."""

config = functools.partial(tiny_config, epochs=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of GraNet, a dense run, masks pruned at the start, a run that is under way."""
    output = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "create_model", make_network)
        train(config(output, experiment="granet-0"))
        train(config(output, experiment=NAME.replace("/", ""), seed=1))
        train(config(output, experiment="dense", method="dense"))
        train(config(output, experiment="snip", method="snip"))
        with pytest.raises(Stopped):
            train(config(output, experiment="under-way", method="rigl"), stop_after=7)
    return output


def page_of(*paths: Path) -> str:
    """The page of the runs in some folders, as the command writes it."""
    found = [runs.read_run(directory) for path in paths for directory in runs.find_runs(path)]
    header, rows = report.table(found)
    notes = [report.CAPTION, *report.agreement(found)]
    return render(found, header=header, rows=rows, notes=notes)


VOID = {"meta", "link", "img"}


class Page(HTMLParser):
    """A page's tables, headings and drawings; refuses tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.feed(text)
        self.close()
        assert self.open == []
        self.drawings = [ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.S)]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        if tag == "section":
            self.ids.append(str(dict(attrs)["id"]))
        elif tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data.strip()

    def table(self, first: str, *, last: str = "") -> list[list[str]]:
        """Rows of the first table whose header begins, and ends, so."""
        for header, *rows in self.tables:
            if header[0] == first and header[-1].endswith(last):
                return rows
        raise AssertionError(f"no table of {first}")

    def drawing(self, title: str) -> ET.Element:
        """The chart with this title."""
        [found] = [
            svg for svg in self.drawings if svg.get("aria-label", "").startswith(f"{title}:")
        ]
        return found
