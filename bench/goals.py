"""What a goal is, and when it is met."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AtLeast:
    """lgd_kernels is at least `times` times as fast as `peer`."""

    peer: str
    times: float

    def ratio(self, ours_ms: float, peer_ms: float) -> float:
        """How many times as fast as the peer lgd_kernels is."""
        return peer_ms / ours_ms

    def is_met(self, ours_ms: float, peer_ms: float) -> bool:
        return self.ratio(ours_ms, peer_ms) >= self.times

    def __str__(self) -> str:
        return f"≥ {self.times:g}x as fast as {self.peer}"


@dataclass(frozen=True)
class AtMost:
    """lgd_kernels takes at most `times` times as long as `peer`."""

    peer: str
    times: float

    def ratio(self, ours_ms: float, peer_ms: float) -> float:
        """How many times as long as the peer lgd_kernels takes."""
        return ours_ms / peer_ms

    def is_met(self, ours_ms: float, peer_ms: float) -> bool:
        return self.ratio(ours_ms, peer_ms) <= self.times

    def __str__(self) -> str:
        return f"≤ {self.times:g}x the time of {self.peer}"


Goal = AtLeast | AtMost


@dataclass(frozen=True)
class Verdict:
    """A goal next to what was measured; `ratio` and `met` are None where one of the two times is missing."""

    goal: Goal
    ratio: float | None
    met: bool | None

    @property
    def word(self) -> str:
        return {True: "met", False: "MISSED", None: "not measured"}[self.met]


def judge(goals: tuple[Goal, ...], median_ms: dict[str, float]) -> list[Verdict]:
    """One verdict per goal, from the medians of the peers that have one."""
    verdicts = []
    for goal in goals:
        ours, peer = median_ms.get("ours"), median_ms.get(goal.peer)
        if ours is None or peer is None:
            verdicts.append(Verdict(goal, None, None))
        else:
            verdicts.append(Verdict(goal, goal.ratio(ours, peer), goal.is_met(ours, peer)))
    return verdicts
