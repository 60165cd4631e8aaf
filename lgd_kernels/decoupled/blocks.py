"""How the layers of a net are cut into blocks, one for each place of a mesh in its dimension "layer"."""

from __future__ import annotations

import itertools

from torch.distributed.device_mesh import DeviceMesh

from lgd_kernels.decoupled.neighbours import DIMENSIONS
from lgd_kernels.decoupled.network import DecoupledNetwork


def blocks_of_layers(mesh: DeviceMesh, n_layers: int) -> list[range]:
    """The places of every block's layers; the numbers of layers differ by 1 at most."""
    if mesh.mesh_dim_names != DIMENSIONS:
        raise ValueError(f"mesh: expected the dimensions {DIMENSIONS}, got {mesh.mesh_dim_names}")
    n_blocks = mesh.size(0)
    if n_blocks > n_layers:
        raise ValueError(f"mesh: has {n_blocks} blocks of layers, but net has {n_layers} layers")
    ends = [n_layers * i // n_blocks for i in range(n_blocks + 1)]
    return [range(start, stop) for start, stop in itertools.pairwise(ends)]


def check_parameters(net: DecoupledNetwork, blocks: list[range]) -> None:
    """None of them is needed by two ranks of one shard."""
    found: dict[int, int] = {}
    for i, block in enumerate(blocks):
        for t in block:
            for name, parameter in net.layers[t].named_parameters():
                if found.setdefault(id(parameter), i) != i:
                    raise ValueError(
                        f"net: layer {t} of block {i} shares {name} with block {found[id(parameter)]}; blocks have "
                        "parameters of their own"
                    )


def block_of(name: str, blocks: list[range]) -> int:
    """Where a tensor of the net's state_dict is: layers.<t>.*, or of the head's loss."""
    kind, place, *_ = name.split(".")
    return next(i for i, block in enumerate(blocks) if int(place) in block) if kind == "layers" else len(blocks) - 1
