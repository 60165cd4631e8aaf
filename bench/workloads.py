"""What is measured, as data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from bench.goals import AtLeast, AtMost, Goal
from bench.operations import DECOUPLED_STEP, SOFTMAX_INFOGAIN, Operation


@dataclass(frozen=True)
class SoftmaxInfogainWorkload:
    """Loss and gradient of softmax_infogain, mean over the rows.

    infogain: the kind of H. shape: of the logits, (N, C) or (N, C, d1, d2). dtype: of the logits, a name of torch's.
    device: "cpu" or "cuda".
    """

    infogain: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    goals: tuple[Goal, ...] = ()
    peers: tuple[str, ...] = ("copy", "eager", "compiled", "ours")
    device: str = "cpu"
    operation: ClassVar[Operation] = SOFTMAX_INFOGAIN

    @property
    def name(self) -> str:
        """What the results file and `--only` call it."""
        device = "" if self.device == "cpu" else f"/{self.device}"
        return f"{self.operation.name}/{self.infogain}/{'x'.join(map(str, self.shape))}/{self.dtype}{device}"

    @property
    def label(self) -> str:
        """What tables and pictures call it."""
        dtype = "" if self.dtype == "float32" else f", {self.dtype}"
        return f"{self.infogain.replace('_', ' ')} H, {' x '.join(f'{size:,}' for size in self.shape)}{dtype}"

    def reduced(self) -> SoftmaxInfogainWorkload:
        """The same with a sixteenth of the samples, for a quick look."""
        return dataclasses.replace(self, shape=(max(1, self.shape[0] // 16), *self.shape[1:]), goals=())


@dataclass(frozen=True)
class DecoupledStepWorkload:
    """One step of training of a net of `depth` tanh layers of one width, squared error, SGD with momentum: by
    backpropagation, or by one visit with one step of the hidden values.

    dtype: of the samples and of z; weights are float32. is_sweep: part of the sweep over depths. device: "cpu" or
    "cuda".
    """

    depth: int
    width: int
    n_samples: int
    dtype: str = "float32"
    goals: tuple[Goal, ...] = ()
    peers: tuple[str, ...] = ("copy", "eager", "batched", "compiled", "bmm", "bmm_compiled", "ours")
    is_sweep: bool = False
    device: str = "cpu"
    operation: ClassVar[Operation] = DECOUPLED_STEP

    @property
    def name(self) -> str:
        """What the results file and `--only` call it."""
        sweep, device = "depth/" if self.is_sweep else "", "" if self.device == "cpu" else f"/{self.device}"
        return f"{self.operation.name}/{sweep}{self.depth}x{self.width}x{self.n_samples}/{self.dtype}{device}"

    @property
    def label(self) -> str:
        """What tables and pictures call it."""
        dtype = "" if self.dtype == "float32" else f", z in {self.dtype}"
        return f"{self.depth} layers of {self.width:,}, {self.n_samples:,} samples{dtype}"

    def reduced(self) -> DecoupledStepWorkload:
        """The same with a sixteenth of the samples, for a quick look."""
        return dataclasses.replace(self, n_samples=max(1, self.n_samples // 16), goals=())


# each: operation, device, name, label, peers, goals, reduced()
Workload = SoftmaxInfogainWorkload | DecoupledStepWorkload


def is_sweep(workload: Workload) -> bool:
    """Whether the workload is part of a sweep over depths."""
    return isinstance(workload, DecoupledStepWorkload) and workload.is_sweep


def _decoupled(depth: int, width: int, n_samples: int, times: float) -> DecoupledStepWorkload:
    """`times` as fast as the faster one of eager and compiled backpropagation, and twice as fast as bmm."""
    goals = (AtLeast("eager", times), AtLeast("compiled", times), AtLeast("bmm_compiled", 2))
    return DecoupledStepWorkload(depth, width, n_samples, goals=goals)


SHALLOW, SWEEP_WIDTH, SWEEP_ROWS = 8, 128, 32768  # the least depth of the sweep; width; layers times samples


def _sweep(depth: int, *others: str, dtype: str = "float32", device: str = "cpu") -> DecoupledStepWorkload:
    """A depth of the sweep: as many products of as many numbers at every depth."""
    peers, goals = ("copy", *others, "ours"), ()
    if depth != SHALLOW:
        peers, goals = (*peers, "shallow"), (AtMost("shallow", 1.1),)
    return DecoupledStepWorkload(depth, SWEEP_WIDTH, SWEEP_ROWS // depth, dtype, goals, peers, True, device)


ELEMENTS = 2**28  # of the large workloads of a GPU: half a gigabyte of bfloat16, many times what its cache holds
COPY_RATE = AtMost("copy", 1.11)  # nine tenths of the rate of a copy


def _on_gpu(infogain: str, shape: tuple[int, int], dtype: str, *goals: Goal) -> SoftmaxInfogainWorkload:
    """At least as fast as everybody else, besides `goals`."""
    others = ("eager", "compiled", "liger") if infogain in ("identity", "label_smoothing") else ("eager", "compiled")
    goals = (*goals, *(AtLeast(peer, 1) for peer in others))
    peers = ("copy", *others, "cuda", "triton", "ours")
    return SoftmaxInfogainWorkload(infogain, shape, dtype, goals, peers, device="cuda")


def _large(infogain: str, n_classes: int, *goals: Goal) -> SoftmaxInfogainWorkload:
    return _on_gpu(infogain, (ELEMENTS // n_classes, n_classes), "bfloat16", *goals)


def _decoupled_on_gpu(depth: int, width: int, n_samples: int, times: float, than_bmm: float) -> DecoupledStepWorkload:
    """`times` as fast as the fastest backpropagation, and never slower; `than_bmm` as fast as bmm."""
    peers = ("eager", "eager_graph", "batched", "compiled", "bmm", "bmm_compiled")
    goals = tuple(AtLeast(peer, times if peer in peers[:4] else than_bmm) for peer in peers[1:])
    return DecoupledStepWorkload(
        depth, width, n_samples, "bfloat16", goals, ("copy", *peers, "cuda", "triton", "ours"), device="cuda"
    )


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
    _decoupled(32, 64, 64, times=6),
    _decoupled(32, 128, 256, times=2.7),
    _decoupled(32, 256, 256, times=2.3),
    _decoupled(8, 1024, 256, times=2),
    DecoupledStepWorkload(32, 256, 256, dtype="bfloat16"),
    *(_sweep(depth, "eager", "compiled", "bmm_compiled") for depth in (8, 16, 32, 64, 128)),
    # what matters most first: a run on a borrowed GPU may be stopped
    *(_large("identity", n_classes, COPY_RATE) for n_classes in (1000, 4096, 32000, 65536, 128256, 262144)),
    *(_large("dense", n_classes, COPY_RATE) for n_classes in (1000, 4096)),
    _large("dense", 32000),  # the rows of H alone are half as many bytes again as the two passes over the logits
    _on_gpu("identity", (65536, 10), "float32"),
    _on_gpu("identity", (8192, 1000), "float32"),
    _on_gpu("identity", (1024, 32000), "float32"),
    _decoupled_on_gpu(32, 256, 256, times=10, than_bmm=1.25),
    _decoupled_on_gpu(64, 1024, 1024, times=1, than_bmm=1.1),
    _decoupled_on_gpu(32, 128, 64, times=20, than_bmm=1.25),
    _decoupled_on_gpu(32, 1024, 1024, times=1.8, than_bmm=1.1),
    _decoupled_on_gpu(8, 4096, 4096, times=1, than_bmm=0.98),
    *(_sweep(depth, "eager_graph", "bmm", dtype="bfloat16", device="cuda") for depth in (8, 32, 128)),
    _large("label_smoothing", 32000),
    _large("sparse", 4096),
)
