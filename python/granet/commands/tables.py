"""Tables on a terminal, and what is in their cells."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence


def mean_and_deviation(values: Sequence[float], form: str) -> str:
    """Mean ± sample standard deviation; a single or constant value alone; `-` for none."""
    if not values:
        return "-"
    mean = form.format(statistics.fmean(values))
    if len(set(values)) == 1:
        return mean
    return f"{mean} ± {form.format(statistics.stdev(values))}"


def render_plain(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned by spaces, the first to the left, the rest to the right."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    text = []
    for line in lines:
        cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        text.append("  ".join([line[0].ljust(widths[0]), *cells[1:]]).rstrip())
    text.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(text)


def show(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A rich table on a terminal, plain text elsewhere."""
    if sys.stdout.isatty():
        try:
            from rich.box import SIMPLE_HEAD
            from rich.console import Console
            from rich.table import Table
        except ModuleNotFoundError:
            pass
        else:
            rich_table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
            for column, name in enumerate(header):
                rich_table.add_column(name, justify="right" if column else "left")
            for row in rows:
                rich_table.add_row(*row)
            Console().print(rich_table)
            return
    print(render_plain(header, rows))
