"""From a race to the rows that compare ours with each baseline."""

from __future__ import annotations

from bench.cpu.race import Race
from bench.cpu.rows import Row, compared, outcome
from bench.cpu.targets import Target
from granet_kernels.ops import backend_for


def row(
    race: Race,
    *,
    group: str,
    case: str,
    measure: str,
    threads: int,
    baseline: str,
    ours: str,
    sparsity: float | None = None,
    masks: str = "",
    label: str = "",
    baseline_label: str = "",
    operator: str = "",
    target: Target | None = None,
    cost: bool = False,
    images: int | None = None,
) -> Row | None:
    """One row; None where the baseline is not in the race at all (it is not installed).

    `operator` tells whose backend is named; the labels are what the row calls the roles.
    """
    if not race.has(baseline):
        return None
    found = race.compare(baseline, ours, measure)
    speedup = None if found is None else found.speedup
    reason = "; ".join(filter(None, (race.failure(baseline), race.failure(ours))))
    only_baseline_failed = bool(race.failure(baseline)) and not race.failure(ours)
    return Row(
        group=group,
        case=case,
        measure=measure,
        threads=threads,
        sparsity=sparsity,
        masks=masks,
        baseline=baseline_label or baseline,
        ours=label or ours,
        backend=backend_for(operator, "cpu") if operator else "",
        cost=cost,
        target=target,
        outcome="" if only_baseline_failed else outcome(speedup, target),
        images=images,
        note=reason,
        **compared(found),  # type: ignore[arg-type]
    )
