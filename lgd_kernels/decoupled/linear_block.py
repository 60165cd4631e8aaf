"""The residual layer that the fused ops know, and the net that is made of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lgd_kernels.arguments import check_at_least, check_bool, check_number, one_of
from lgd_kernels.reference.activations import ACTIVATIONS, activate
from lgd_kernels.reference.decoupled_linear import functions_of


class LinearBlock(nn.Module):
    """A linear layer with an activation before or behind it, beside a skip connection:

        z -> skip z + f(branch_scale phi(z) W^T + b)

    phi is the activation and f the identity with `preactivation`, else the other way round. The weight starts as
    N(0, 1) and the bias as 0, so that branch_scale carries the usual fan-in, and in a residual net the depth as well
    (Yang et al. 2023, arXiv:2310.02244).

    Args:
        d_in, d_out: widths of input (n, d_in) and output (n, d_out).
        activation: a name as in `decoupled_linear_loss`.
        preactivation: whether the activation is applied to the input instead of the raw logits.
        skip: coefficient of the skip connection; other than 0 it needs d_in == d_out.
        branch_scale: factor of the linear map.
        bias: whether there is one.

    Raises TypeError or ValueError for an argument of the wrong type or value.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        activation: str,
        preactivation: bool,
        skip: float,
        branch_scale: float,
        bias: bool = True,
    ):
        super().__init__()
        one_of("activation", activation, ACTIVATIONS)
        check_bool("preactivation", preactivation)
        check_number("skip", skip)
        check_number("branch_scale", branch_scale)
        if skip != 0 and d_in != d_out:
            raise ValueError(f"skip: is {skip}, which needs d_in == d_out, got {d_in} and {d_out}")
        self.activation, self.preactivation = activation, preactivation
        self.skip, self.branch_scale = float(skip), float(branch_scale)
        self.weight = nn.Parameter(torch.empty(d_out, d_in))
        self.bias = nn.Parameter(torch.empty(d_out)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight from N(0, 1), and set the bias to 0."""
        nn.init.normal_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, z: Tensor) -> Tensor:
        """(n, d_out) for z (n, d_in)."""
        phi, f = functions_of(ACTIVATIONS.index(self.activation), self.preactivation)
        branch = activate(f, nn.functional.linear(self.branch_scale * activate(phi, z), self.weight, self.bias))
        return branch if self.skip == 0 else torch.add(branch, z, alpha=self.skip)

    def extra_repr(self) -> str:
        d_out, d_in = self.weight.shape
        place = "before" if self.preactivation else "behind"
        return (
            f"{d_in}, {d_out}, {self.activation} {place}, skip={self.skip:g}, branch_scale={self.branch_scale:.3g}, "
            f"bias={self.bias is not None}"
        )


def parameter_groups(net: nn.Module, lr: float) -> list[dict]:
    """The parameters of a net for an optimizer such as Adam, whose steps have the size of the learning rate whatever
    the gradient: lr, but lr * branch_scale for the bias of a `LinearBlock`, so that it moves the block's output like
    its weight.

    With the same rate for both, the biases of many layers together outrun the weights: with 31 hidden values, stored z
    and multipliers, 1 visit of 8 steps and lr 0.03, digits came to 93.6 % instead of 96.7 (1 seed).
    """
    rates = {
        block.bias: lr * block.branch_scale
        for block in net.modules()
        if isinstance(block, LinearBlock) and block.bias is not None
    }
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter in net.parameters():
        groups.setdefault(rates.get(parameter, lr), []).append(parameter)
    return [{"params": parameters, "lr": rate} for rate, parameters in groups.items()]


def residual_net(n_inputs: int, width: int, depth: int, n_classes: int, activation: str = "relu") -> list[LinearBlock]:
    """The layers of a residual net with `depth` hidden values, in the parameterisation that does not change with depth.

        z_1     = x W_0^T / sqrt(n_inputs) + b_0
        z_(t+1) = z_t + phi(z_t) W_t^T / sqrt(width depth) + b_t          t = 1 .. depth - 1
        outputs = phi(z_depth) W_depth^T / sqrt(width) + b_depth

    All weights start as N(0, 1) and biases as 0. For `DecoupledNetwork`, or as nn.Sequential(*layers).

    Args:
        n_inputs, width, n_classes: widths of the input, of all hidden values, and of the output.
        depth: number of hidden values, at least 1; the net has depth + 1 layers.
        activation: phi, a name as in `decoupled_linear_loss`.

    Raises TypeError or ValueError for an argument of the wrong type or value.
    """
    for name, number in {"n_inputs": n_inputs, "width": width, "depth": depth, "n_classes": n_classes}.items():
        check_at_least(name, number, 1)

    def block(d_in: int, d_out: int, phi: str, skip: float, fan_in: int) -> LinearBlock:
        return LinearBlock(d_in, d_out, activation=phi, preactivation=True, skip=skip, branch_scale=fan_in**-0.5)

    return [
        block(n_inputs, width, "identity", 0.0, n_inputs),
        *(block(width, width, activation, 1.0, width * depth) for _ in range(depth - 1)),
        block(width, n_classes, activation, 0.0, width),
    ]
