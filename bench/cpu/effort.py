"""How much to measure: all of it in twenty minutes on two cores, or a taste in two minutes."""

from __future__ import annotations

from dataclasses import dataclass

SPARSITIES = (0.8, 0.9, 0.95, 0.98)


@dataclass(frozen=True, kw_only=True, slots=True)
class Effort:
    """What a run takes upon itself."""

    quick: bool = False
    """Fewer cases and rounds: does everything run, and is nothing far off?"""
    most_rounds: int = 21
    sparsities: tuple[float, ...] = SPARSITIES

    def rounds(self, seconds_a_round: float, seconds: float, least: int = 3) -> int:
        """As many rounds as fill `seconds`, within limits. Odd, so that a median is a measurement."""
        wanted = int((seconds / 4 if self.quick else seconds) / max(seconds_a_round, 1e-6))
        rounds = max(1 if self.quick else least, min(self.most_rounds, wanted))
        return rounds - 1 if rounds > least and rounds % 2 == 0 else rounds


FULL = Effort()
QUICK = Effort(quick=True, most_rounds=5, sparsities=(0.9,))
