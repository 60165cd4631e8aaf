"""What is measured, as data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from bench.goals import AtLeast, AtMost, Goal


@dataclass(frozen=True)
class SoftmaxInfogainWorkload:
    """Loss and gradient of softmax_infogain, mean over the rows.

    infogain: the kind of H. shape: of the logits, (N, C) or (N, C, d1, d2). dtype: of the logits, a name of torch's.
    """

    infogain: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    goals: tuple[Goal, ...] = ()
    peers: tuple[str, ...] = ("copy", "eager", "compiled", "ours")
    operation: str = "softmax_infogain"

    @property
    def name(self) -> str:
        """What the results file and `--only` call it."""
        return f"{self.operation}/{self.infogain}/{'x'.join(map(str, self.shape))}/{self.dtype}"

    @property
    def label(self) -> str:
        """What tables and pictures call it."""
        dtype = "" if self.dtype == "float32" else f", {self.dtype}"
        return f"{self.infogain.replace('_', ' ')} H, {' x '.join(f'{size:,}' for size in self.shape)}{dtype}"

    def reduced(self) -> SoftmaxInfogainWorkload:
        """The same with a sixteenth of the samples, for a quick look."""
        return dataclasses.replace(self, shape=(max(1, self.shape[0] // 16), *self.shape[1:]), goals=())


Workload = SoftmaxInfogainWorkload  # every operation adds its class: operation, name, label, peers, goals, reduced()

WORKLOADS: tuple[Workload, ...] = (
    SoftmaxInfogainWorkload(
        "dense", (8192, 1000), goals=(AtLeast("eager", 7), AtLeast("compiled", 2.5), AtMost("copy", 1.6))
    ),
    SoftmaxInfogainWorkload("identity", (65536, 10), goals=(AtLeast("eager", 10), AtLeast("compiled", 2.5))),
    SoftmaxInfogainWorkload("identity", (8192, 1000), goals=(AtLeast("eager", 3), AtLeast("compiled", 2.5))),
    SoftmaxInfogainWorkload("identity", (1024, 32000), goals=(AtLeast("eager", 4), AtLeast("compiled", 2.5))),
    SoftmaxInfogainWorkload("sparse", (8192, 1000)),
    SoftmaxInfogainWorkload("label_smoothing", (8192, 1000)),
    SoftmaxInfogainWorkload("identity", (8192, 1000), dtype="bfloat16"),
    SoftmaxInfogainWorkload("identity", (1, 1_000_000)),
    SoftmaxInfogainWorkload("identity", (4, 21, 256, 256)),
)
