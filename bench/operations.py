"""What the operations that are measured are called in tables and pictures."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, eq=False)  # each is itself only, and a key
class Operation:
    """op: what `lgd_kernels.ops` calls it. titles: of the peers, in the order of tables. floor: what the floor is made
    of. unit: the peer whose time is 1 in the picture; shown: the peers that it shows where a run has them, top to
    bottom."""

    name: str
    op: str
    heading: str
    titles: dict[str, str]
    floor: str
    unit: str
    shown: tuple[str, ...]


SOFTMAX_INFOGAIN = Operation(
    "softmax_infogain",
    "softmax_infogain",
    "loss + gradient",
    {
        "copy": "copy of the logits",
        "eager": "PyTorch eager",
        "compiled": "torch.compile",
        "liger": "liger-kernel",
        "cuda": "lgd_kernels, CUDA C++",
        "triton": "lgd_kernels, Triton",
        "ours": "lgd_kernels",
    },
    "The floor is one read and one write of the logits and one read of H, at the rate at which a copy of the logits "
    "ran in the same run.",
    "copy",
    ("eager", "compiled", "liger", "cuda", "triton", "ours"),
)
DECOUPLED_STEP = Operation(
    "decoupled_step",
    "decoupled_step_",
    "one step of training",
    {
        "copy": "copy of z",
        "eager": "backpropagation",
        "eager_graph": "backpropagation, CUDA graph",
        "batched": "backpropagation, weight gradients in one bmm",
        "compiled": "backpropagation, torch.compile",
        "bmm": "the same step with bmm",
        "bmm_compiled": "the same step with bmm, torch.compile",
        "shallow": "lgd_kernels, 8 layers",
        "cuda": "lgd_kernels, CUDA C++",
        "triton": "lgd_kernels, Triton",
        "ours": "lgd_kernels",
    },
    "A step of backpropagation is three matrix products for every layer; a decoupled one is four, because the weights "
    "move after the hidden values: forward, gradient of z, and at the new z forward and gradient of the weights. The "
    "floor is these four at the rate of `torch.mm` on large matrices in the same run. On a GPU all but plain "
    "backpropagation run as CUDA graphs.",
    "ours",
    ("eager", "eager_graph", "batched", "compiled", "bmm", "bmm_compiled", "cuda", "triton", "ours"),
)
