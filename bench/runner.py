"""Measures rows together, in turn, and makes records of them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from bench.machine import Stamp, stamp
from bench.records import Row, failed_row, measured_row
from bench.registry import Case, Setting, Yardstick
from bench.timing import GRAPH_CALLS, Effort, Sample, Subject, graph_replay, measure
from bench.yardsticks.bandwidth import REFERENCE_COPY

EAGER, GRAPH = "eager", "graph"
TOY_NOTE = "toy sizes: not a result"


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A row in one mode: what to time, or the error that prevents it."""

    row: Yardstick
    mode: str
    case: Case | None = None
    subject: Subject | None = None
    error: Exception | None = None


def label(row: Yardstick, mode: str) -> str:
    """Distinct for every entry of a run."""
    return "|".join([*map(str, row.key), mode])


def _graph_entry(row: Yardstick, case: Case) -> Entry:
    calls = -(-GRAPH_CALLS // case.copies) * case.copies  # every copy equally often
    calls = calls if case.reset is None else 1  # what a call spends is restored before the next
    try:
        with case.around():
            replay = graph_replay(case.run, calls)
    except Exception as error:  # whatever a baseline raises is a result
        return Entry(row=row, mode=GRAPH, error=error)
    subject = Subject(label=label(row, GRAPH), run=replay, calls=calls, reset=case.reset)
    return Entry(row=row, mode=GRAPH, case=case, subject=subject)


def _entries(row: Yardstick, setting: Setting) -> list[Entry]:
    """The row run eagerly and, on a GPU and where it asks for it, replayed from a CUDA graph."""
    try:
        case = row.build(setting)
    except Exception as error:
        return [Entry(row=row, mode=EAGER, error=error)]
    subject = Subject(label=label(row, EAGER), run=case.run, reset=case.reset, around=case.around)
    entries = [Entry(row=row, mode=EAGER, case=case, subject=subject)]
    if row.graph and setting.device.type == "cuda":
        entries.append(_graph_entry(row, case))
    return entries


def _copy_rate(entries: Sequence[Entry], samples: Mapping[str, Sample]) -> float | None:
    """GB/s of the reference copy; None where it failed."""
    sample = samples.get(label(REFERENCE_COPY, EAGER))
    case = next((e.case for e in entries if e.row == REFERENCE_COPY), None)
    return case.model_bytes / sample.median_ms / 1e6 if case and sample else None


def _baseline_ms(
    entry: Entry, rows: Sequence[Yardstick], samples: Mapping[str, Sample]
) -> float | None:
    """Median of the entry's baseline in the same mode, or eager where it has no other."""
    wanted = (entry.row.group, entry.row.baseline, entry.row.dtype)
    for row in rows:
        if (row.group, row.id, row.dtype) == wanted:
            sample = samples.get(label(row, entry.mode)) or samples.get(label(row, EAGER))
            return sample.median_ms if sample else None
    return None


def run_rows(rows: Sequence[Yardstick], setting: Setting, effort: Effort) -> Iterator[list[Row]]:
    """Records of all rows in each mode, those of one name at a time: built, timed in turn, given out.

    So whoever is stopped has the names before, and inputs take no more memory than one name's. The time
    that is left is shared by the names that are. The copy that `ratio_to_copy` divides by is added
    where `rows` lacks it. A row that cannot be built, captured or run gives a record with a note and no
    figures.
    """
    on_gpu = setting.device.type == "cuda"
    rows = [REFERENCE_COPY, *(row for row in rows if row != REFERENCE_COPY)]
    rows = [row for row in rows if on_gpu or not row.cuda_only]
    names = list(dict.fromkeys(row.name for row in rows))
    samples: dict[str, Sample] = {}
    copy_rate = None
    for place, name in enumerate(names):
        now = time.time()
        share = dataclasses.replace(effort, until=now + (effort.until - now) / (len(names) - place))
        entries = [entry for row in rows if row.name == name for entry in _entries(row, setting)]
        outcome = measure([e.subject for e in entries if e.subject], setting.device, share)
        origin = stamp(setting.device)
        samples |= {key: got for key, got in outcome.items() if isinstance(got, Sample)}
        copy_rate = copy_rate or _copy_rate(entries, samples)
        note = TOY_NOTE if setting.quick else ""
        yield [
            _record(entry, outcome, origin, copy_rate, _baseline_ms(entry, rows, samples), note)
            for entry in entries
        ]


def _record(
    entry: Entry,
    outcome: Mapping[str, Sample | Exception],
    origin: Stamp,
    copy_rate: float | None,
    baseline_ms: float | None,
    note: str,
) -> Row:
    got = outcome[entry.subject.label] if entry.subject else entry.error
    if isinstance(got, Sample) and entry.case:
        return measured_row(
            entry.row,
            entry.case,
            got,
            mode=entry.mode,
            stamp=origin,
            copy_rate=copy_rate,
            baseline_ms=baseline_ms,
            note=note,
        )
    error = got if isinstance(got, Exception) else RuntimeError("not measured")
    return failed_row(entry.row, error, mode=entry.mode, stamp=origin)
