"""Fixtures of the benchmarks: threads, effort, the race that pytest-benchmark drives, the table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from bench.cpu import host, rows
from bench.cpu.effort import FULL, QUICK, Effort
from bench.cpu.race import Contender, Race
from granet.throughput.stopwatch import no_collection
from granet_kernels import keep_freed_memory

ALL_THREADS = torch.get_num_threads()
RESULTS = Path(__file__).resolve().parent.parent / "results"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("CPU benchmarks")
    group.addoption("--quick", action="store_true", help="a few cases and rounds of each")
    group.addoption(
        "--bench-out", type=Path, help="folder for the CSV (default: bench/results/cpu-<model>)"
    )
    group.addoption("--bench-name", default="cpu", help="the CSV's name (default: cpu)")
    group.addoption(
        "--bench-keep-memory",
        action="store_true",
        help="with granet_kernels.keep_freed_memory(), for all contenders",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[LEDGER] = []
    keeps = config.getoption("--bench-keep-memory")
    if keeps and not keep_freed_memory():
        raise pytest.UsageError(
            "--bench-keep-memory: this C library has no setting for freed memory"
        )
    config.stash[COLUMNS] = host.describe(ALL_THREADS, kept=keeps)


LEDGER = pytest.StashKey[list[rows.Row]]()
COLUMNS = pytest.StashKey[dict[str, object]]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Steps first: our layers ask for large pages, and what torch allocates there later has them, too."""
    items.sort(key=lambda item: item.path.name != "test_step.py")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One thread and all of them; the files add their own cases."""
    if "threads" in metafunc.fixturenames:
        metafunc.parametrize("threads", sorted({1, ALL_THREADS}), indirect=True)


@pytest.fixture
def threads(request: pytest.FixtureRequest):
    """Sets torch's threads, which SparseProp's follow."""
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(ALL_THREADS)


@pytest.fixture
def all_threads() -> int:
    """For what takes too long on one thread."""
    torch.set_num_threads(ALL_THREADS)
    return ALL_THREADS


@pytest.fixture
def effort(request: pytest.FixtureRequest) -> Effort:
    return QUICK if request.config.getoption("--quick") else FULL


@pytest.fixture
def ledger(request: pytest.FixtureRequest) -> list[rows.Row]:
    """Rows go in here; they are printed and written at the end."""
    return request.config.stash[LEDGER]


RunRace = Callable[..., Race]


@pytest.fixture
def race(benchmark, effort: Effort) -> RunRace:
    """Runs a race of contenders for about `seconds` after the warm-up.

    What pytest-benchmark times is the round, all contenders in turn; the medians of each of them
    are in `extra_info` of its JSON.
    """

    def run(contenders: Sequence[Contender], seconds: float, least: int = 3) -> Race:
        race = Race(contenders)
        with no_collection():
            race.warm_up()
            rounds = effort.rounds(race.seconds_a_round, seconds, least)
            benchmark.pedantic(race.round, rounds=rounds, iterations=1, warmup_rounds=0)
        benchmark.extra_info["median_ms"] = race.medians()
        benchmark.extra_info["failures"] = {
            " ".join(key): str(error) for key, error in race.failures.items()
        }
        return race

    return run


def csv_path(config: pytest.Config) -> Path:
    folder = config.getoption("--bench-out") or RESULTS / host.folder_name()
    return Path(folder) / f"{config.getoption('--bench-name')}.csv"


def with_means(config: pytest.Config) -> list[rows.Row]:
    """What was measured so far, and its geometric means."""
    measured = config.stash[LEDGER]
    return [*measured, *rows.geometric_means(measured)]


@pytest.fixture(autouse=True)
def saved(request: pytest.FixtureRequest):
    """Writes the CSV after every test: a run that is cut short keeps what it has."""
    yield
    config = request.config
    rows.write_csv(csv_path(config), with_means(config), config.stash[COLUMNS])


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    """The table."""
    measured = with_means(config)
    if not measured:
        return
    columns = config.stash[COLUMNS]
    terminalreporter.section("CPU benchmarks")
    terminalreporter.write_line(", ".join(f"{name} {value}" for name, value in columns.items()))
    terminalreporter.write_line(rows.table(measured))
    terminalreporter.write_line(rows.summary(measured))
    terminalreporter.write_line(f"written to {csv_path(config)}")
