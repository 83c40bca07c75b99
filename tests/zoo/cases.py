"""The matrix as data: which guards every graph gets, and which answers it must then have. No runtime, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from vlmguard.graphs.modes import Mode, Positions


@dataclass(frozen=True)
class Case:
    """One guard of the matrix."""

    place: str
    mode: Mode
    positions: Positions

    @property
    def name(self) -> str:
        return f"{self.place}-{self.mode}-{self.positions}"

    def layer(self, layers: int) -> int:
        return layers - 1 if self.place == "last" else (layers - 1) // 2


PLACES = ("middle", "last")
CASES = tuple(Case(*parts) for parts in product(PLACES, ("project", "restore"), ("last", "all")))  # type: ignore[arg-type]
# What `vlmguard export` does by default.
EXPORTED = tuple(case for case in CASES if (case.mode, case.positions) == ("restore", "last"))


def expected_checks(truth: str, cached: bool) -> set[tuple[str, str]]:
    """`(check, guard)` of everything that a graph must have a record of."""
    against_torch = ("prefill", "decode") if cached else ("prefill",)
    everywhere = (*(against_torch if truth == "torch" else ()), "reference", "closed")
    found = {("anatomy", ""), *((check, case.name) for case in CASES for check in everywhere)}
    if truth == "torch":
        found.add(("states", ""))
    return found | {("export", case.name) for case in EXPORTED}
