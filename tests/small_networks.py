"""Small nets for the tests of DecoupledNetwork: of layers that the fused ops know, of others, and of both."""

from __future__ import annotations

import copy

import torch
from torch import nn

import lgd_kernels as lgd
from lgd_kernels.decoupled import residual_net

N = 6


def linear_chain():
    return [nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.GELU(), nn.Linear(6, 3)]


def convolutions():
    return [
        *(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)),
        *(nn.Conv2d(4, 6, 3), nn.GroupNorm(2, 6), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(6, 3),
    ]


class Residual(nn.Module):
    """A block of the user's own, which writes to its input's copy as many do."""

    def __init__(self, width):
        super().__init__()
        self.branch = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(width, width), nn.LayerNorm(width))

    def forward(self, z):
        return z + self.branch(z.clone())


def mixed():
    """Linear layers with the activation behind and before it, and between them what the fused ops do not know."""
    post, pre = [nn.Flatten(), nn.Linear(8, 6), nn.Sigmoid()], residual_net(6, 6, 4, 3, "tanh")[1:-1]
    others = [Residual(6), nn.Linear(6, 7), nn.LayerNorm(7), nn.Softplus()]
    return [*post, *pre, *others, nn.Sequential(nn.Linear(7, 4), nn.Tanh(), nn.Linear(4, 3))]


NETS = {
    "linear": (linear_chain, (5,)),
    "residual": (lambda: residual_net(5, 8, 4, 3, "gelu"), (5,)),
    "convolutions": (convolutions, (2, 8, 8)),
    "mixed": (mixed, (2, 4)),
}


def make(name, **options):
    """(the net in eval mode, x, labels)."""
    modules, shape = NETS[name]
    return lgd.DecoupledNetwork(modules(), **options).eval(), torch.randn(N, *shape), torch.randint(3, (N,))


def unfused(net):
    """A copy whose layers are all called by themselves: somebody listens to every module."""
    net = copy.deepcopy(net)
    for module in net.layers.modules():
        if not isinstance(module, (nn.Sequential, nn.ModuleList)):
            module.register_forward_hook(lambda *args: None)
    return net
