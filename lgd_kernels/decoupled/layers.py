"""How a chain of modules is cut into the layers of a decoupled net, and which of them the fused ops know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lgd_kernels.decoupled.linear_block import LinearBlock
from lgd_kernels.reference.activations import LEAKY_SLOPE

# modules with parameters that belong to the layer before them all the same; _NormBase: BatchNorm and InstanceNorm
_JOINING = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.PReLU)


# ---------------------------------------------------------------------------------------------------------------------
# From modules to layers
# ---------------------------------------------------------------------------------------------------------------------


def layers_from(modules: Sequence[nn.Module]) -> list[nn.Sequential]:
    """The modules as layers. Modules without parameters (activations, Flatten, pooling, Dropout) and normalisations
    join the layer before them, or at the beginning the one after. Each other module starts a layer, and so does every
    nn.Sequential."""
    if not isinstance(modules, Sequence):
        raise TypeError(f"modules: expected a list of torch.nn.Modules, got {type(modules).__name__}")
    groups: list[list[nn.Module]] = [[]]
    has_begun = False  # whether the last group has what a layer starts with
    for i, module in enumerate(modules):
        if not isinstance(module, nn.Module):
            raise TypeError(f"modules[{i}]: expected a torch.nn.Module, got {type(module).__name__}")
        if _starts_layer(module):
            if has_begun:
                groups.append([])
            has_begun = True
        groups[-1].append(module)
    if not has_begun:
        raise ValueError(f"modules: expected at least 1 layer with parameters, got {len(modules)} modules without any")
    return [nn.Sequential(*group) for group in groups]


def _starts_layer(module: nn.Module) -> bool:
    if isinstance(module, nn.Sequential):
        return True
    return not isinstance(module, _JOINING) and next(module.parameters(), None) is not None


# ---------------------------------------------------------------------------------------------------------------------
# What a layer is made of
# ---------------------------------------------------------------------------------------------------------------------


class LinearLayer(NamedTuple):
    """A layer in the terms of the fused ops: z -> skip z + f(branch_scale phi(z) W^T + b)."""

    weight: nn.Parameter  # (d_out, d_in)
    bias: nn.Parameter | None  # (d_out,)
    activation: str
    preactivation: bool
    skip: float = 0.0
    branch_scale: float = 1.0

    def parameters(self) -> list[nn.Parameter]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]


def chain_of(layer: nn.Module) -> list[nn.Module]:
    """The modules that a layer calls one after the other."""
    if type(layer) is nn.Sequential and not _has_hooks(layer):
        return [module for child in layer for module in chain_of(child)]
    return [layer]


def split_input(chain: list[nn.Module]) -> tuple[list[nn.Module], list[nn.Module]]:
    """(what a chain does to its input without parameters or buffers, such as Flatten; the rest of it)."""
    for i, module in enumerate(chain):
        if _has_state(module) or _has_hooks(module):
            return chain[:i], chain[i:]
    return chain, []


def split_activation(chain: list[nn.Module]) -> tuple[list[nn.Module], str]:
    """(the chain without the activation at its end, that activation's name), "identity" if it is none of ours."""
    name = activation_of(chain[-1]) if chain else None
    return (chain, "identity") if name is None else (chain[:-1], name)


def linear_layer(chain: list[nn.Module]) -> LinearLayer | None:
    """A LinearBlock, or an nn.Linear with or without an activation, as the fused ops take it; None for all else."""
    if not chain:
        return None
    first, *rest = chain
    if type(first) is LinearBlock and not rest and not _has_hooks(first):
        options = (first.activation, first.preactivation, first.skip, first.branch_scale)
        return LinearLayer(first.weight, first.bias, *options)
    if type(first) is nn.Linear and len(rest) <= 1 and not _has_hooks(first):
        activation = activation_of(rest[0]) if rest else "identity"
        if activation is not None:
            return LinearLayer(first.weight, first.bias, activation, preactivation=False)
    return None


def activation_of(module: nn.Module) -> str | None:
    """The name that reference.ACTIVATIONS has for a module; None if it has none."""
    if _has_hooks(module):
        return None
    if type(module) is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}[module.approximate]
    if type(module) is nn.LeakyReLU:
        return "leaky_relu" if module.negative_slope == LEAKY_SLOPE else None
    return _ACTIVATIONS.get(type(module))


_ACTIVATIONS = {
    nn.Identity: "identity",
    nn.ReLU: "relu",
    nn.Sigmoid: "sigmoid",
    nn.SiLU: "silu",
    nn.Tanh: "tanh",
}


def _has_state(module: nn.Module) -> bool:
    return any(True for tensors in (module.parameters(), module.buffers()) for _ in tensors)


def _has_hooks(module: nn.Module) -> bool:
    """Whether somebody wants to be told when the module is called, so that it must be."""
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))


# ---------------------------------------------------------------------------------------------------------------------
# Calling a layer
# ---------------------------------------------------------------------------------------------------------------------


def call(chain: Sequence[nn.Module], z: Tensor, *, keep_buffers: bool) -> Tensor:
    """The chain's output for z, which it may not write to.

    keep_buffers: leave buffers, such as the running statistics of BatchNorm, as they are.
    """
    module = nn.Sequential(*chain)
    if any(getattr(part, "inplace", False) for part in module.modules()):
        z = z.clone()
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()} if keep_buffers else {}
    return torch.func.functional_call(module, buffers, (z,)) if buffers else module(z)


def in_precision_of(chain: Sequence[nn.Module], z: Tensor) -> Tensor:
    """z in the dtype of the chain's parameters, if it is stored in 16 bits."""
    parameter = next((p for module in chain for p in module.parameters()), None)
    return z if parameter is None or z.dtype not in (torch.bfloat16, torch.float16) else z.to(parameter.dtype)


def share_storage(a: Tensor, b: Tensor) -> bool:
    """Whether the two may be views of one memory, as what Flatten or Identity make is of what they take."""
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
