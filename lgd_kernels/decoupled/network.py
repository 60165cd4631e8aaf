"""A feed-forward net of any modules that can be trained layer by layer, all layers at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lgd_kernels.arguments import check_int, check_not_negative, one_of
from lgd_kernels.decoupled.decoupled_step import HEADS, decoupled_step_
from lgd_kernels.decoupled.energy import (
    Evaluation,
    Net,
    Point,
    by_place_of_activation,
    move_values_,
    net_and_input,
    set_mean_gradients,
)
from lgd_kernels.decoupled.layers import LinearLayer, call, layers_from, share_storage
from lgd_kernels.decoupled.optimizer_state import is_fusable
from lgd_kernels.decoupled.step_size import largest_curvature
from lgd_kernels.infogain import Infogain
from lgd_kernels.losses import SoftmaxInfogainLoss
from lgd_kernels.losses.checks import hidden_loss_code, weights_of_energy


class Visit(NamedTuple):
    """What a visit of a minibatch leaves for the logs. It is still on the device: nothing has waited for it."""

    energies: Tensor  # (T,): sums over the samples, before the step of the parameters; the last one is the loss
    residual_norm: Tensor  # (T-1,): Euclidean norms of e_t = z_t - zhat_t over samples and units, at the same place
    value_norm: Tensor  # (T-1,): and those of z_t


class DecoupledNetwork(nn.Module):
    """A feed-forward net whose hidden values may be variables of their own, one row per sample, so that all its layers
    learn at once, each from its own input and its own target.

        E   = sum over samples of  L(target, zhat_T) + sum over t = 1 .. T-1 of  rho L_h(e_t) + <lambda_t, e_t>
        e_t = z_t - zhat_t,   zhat_(t+1) = layer t of z_t,   z_0 = x

    `net(x)` is the ordinary net, with ordinary parameters, state_dict and export. Training by `visit_` is the method of
    auxiliary coordinates (Carreira-Perpinan & Wang 2014, arXiv:1212.5921), with multipliers lambda the method of
    multipliers (Taylor et al. 2016, arXiv:1605.02026). The net stores neither z nor lambda: they belong to the samples.

    Layers that are an nn.Linear, with or without one of the activations that `decoupled_linear_loss` names behind it,
    or a `LinearBlock`, go to the fused ops together: a net of nothing else is visited by one call of
    `decoupled_step_`. All other layers are called with their own autograd, and independently of each other.

    Args:
        modules: a chain of modules. Those without parameters (activations, Flatten, pooling, Dropout) and
            normalisations join the layer before them, or at the beginning the one after. Each other module starts a
            layer; an nn.Sequential is one layer, or begins one.
        head: the loss of the last layer. "softmax_infogain": `softmax_infogain_loss` of its raw logits with H.
            "squared": half of the squared distance of its output to the target.
        H: an `Infogain`, for the head "softmax_infogain"; None is cross entropy. Its tensors become buffers.
        ignore_index: rows with this label have no loss at the head.
        hidden_loss, kappa: L_h, as in `decoupled_linear_loss`.

    Attributes:
        layers: nn.ModuleList of T nn.Sequentials; layer t makes zhat_(t+1) of z_t.

    Methods take x (n, ...), target (labels (n, ...), int64 or uint8, or for the head "squared" a tensor like the
    output), z and multiplier as lists of T-1 tensors (n, ...), z[t] in the shape of what layer t makes, and rho as one
    number or T-1 of them. z may be stored in bfloat16 or float16; a layer gets it in the dtype of its parameters, but
    the products of fused layers round their operands to bfloat16 where z has it. Autocast concerns the other layers.

    Raises:
        TypeError, ValueError: an argument of the wrong type, value, shape or dtype.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        *,
        head: str = "softmax_infogain",
        H: Infogain | None = None,
        ignore_index: int = -100,
        hidden_loss: str = "squared",
        kappa: float = 1.0,
    ):
        super().__init__()
        one_of("head", head, HEADS)
        check_int("ignore_index", ignore_index)
        if head == "squared" and H is not None:
            raise ValueError(f"H: {H!r} needs head='softmax_infogain', got head='squared'")
        hidden_loss_code(hidden_loss, kappa)
        self.layers = nn.ModuleList(layers_from(modules))
        self.head, self.hidden_loss, self.kappa = head, hidden_loss, float(kappa)
        self.criterion = None
        if head == "softmax_infogain":
            self.criterion = SoftmaxInfogainLoss(H, ignore_index=ignore_index, reduction="sum")

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    # -----------------------------------------------------------------------------------------------------------------
    # The ordinary net
    # -----------------------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """The output of the last layer: raw logits (n, C, ...) for the head "softmax_infogain"."""
        for layer in self.layers:
            x = layer(x)
        return x

    def loss(self, x: Tensor, target: Tensor) -> Tensor:
        """Mean loss over the samples of the ordinary net, differentiable: what backpropagation would train with. Rows
        with the label ignore_index count in the mean, as they do in that of the gradients of a visit."""
        return self.head_loss(self(x), target) / max(len(x), 1)

    @torch.no_grad()
    def hidden_values(self, x: Tensor) -> list[Tensor]:
        """z_1 .. z_(T-1) of the ordinary net, without a graph. Buffers stay as they are."""
        return outputs_of(self.layers[:-1], x)

    def head_loss(self, output: Tensor, target: Tensor) -> Tensor:
        """L, summed over the samples, from the output of the last layer."""
        return head_loss(self.criterion, output, target)

    # -----------------------------------------------------------------------------------------------------------------
    # The decoupled net
    # -----------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def visit_(
        self,
        x: Tensor,
        z: list[Tensor],
        target: Tensor,
        *,
        multiplier: list[Tensor] | None = None,
        step_size: float,
        steps: int = 1,
        rho: float | Sequence[float] = 1.0,
        dual_step: float | None = None,
        optimizer: Optimizer | None = None,
    ) -> Visit:
        """One visit of a minibatch: moves its z and multiplier, then the parameters, all of them in place.

        One visit is `steps` times, for all layers at once,

            lambda_t += dual_step e_t   (except in the first of them)
            z_t      -= step_size dE/dz_t

        and then once more lambda_t += dual_step e_t (if steps > 0), and one step of the optimizer with the mean over
        the samples of dE/dW at the final z and lambda. Buffers, such as the running statistics of BatchNorm, change
        once, with the final z.

        Args:
            x, z, target, multiplier, rho: see the class. multiplier None: no multipliers.
            step_size: of z; 1 / `largest_curvature` is stable.
            steps: of z in this visit; 0 moves only the parameters.
            dual_step: of the multipliers; at most rho is stable. None: half of the smallest rho.
            optimizer: of some or all parameters; any whose step needs no closure. SGD, Adam and AdamW are fused with
                the computation of the gradients, which then do not appear in `.grad`, where the net is visited by one
                call. None: the gradients are left in `.grad`, in place of what was there, and the parameters stay.
        """
        rhos = self._check_values(x, z, multiplier, rho)
        check_steps(step_size, steps)
        dual_step = step_of_multiplier(dual_step, rhos, multiplier)
        net, x = self._net_and_input(x)
        numbers = {"step_size": step_size, "steps": steps, "rho": rhos, "dual_step": dual_step}
        if _is_one_call(net, x, self.head):
            return self._visit_in_one_call_(net.linear, x, z, target, multiplier, optimizer, numbers)
        return self._visit_layers_(net, x, z, target, multiplier, optimizer, **numbers)

    @torch.no_grad()
    def evaluation(
        self,
        x: Tensor,
        z: list[Tensor],
        target: Tensor,
        *,
        multiplier: list[Tensor] | None = None,
        rho: float | Sequence[float] = 1.0,
    ) -> Evaluation:
        """All layers at this z and multiplier: energies, residuals, and gradients on request. Nothing is changed."""
        rhos = self._check_values(x, z, multiplier, rho)
        net, x = self._net_and_input(x)
        return Evaluation(net, Point([x, *z], target, multiplier, rhos))

    @torch.no_grad()
    def hidden_gradient(
        self,
        x: Tensor,
        z: list[Tensor],
        target: Tensor,
        *,
        multiplier: list[Tensor] | None = None,
        rho: float | Sequence[float] = 1.0,
    ) -> list[Tensor]:
        """dE/dz_t in the shapes of z (float32 where z has 16 bits): the gradient of a sum over the samples. Nothing is
        changed."""
        return self.evaluation(x, z, target, multiplier=multiplier, rho=rho).hidden_gradient()

    @torch.no_grad()
    def local_gradient_(
        self,
        x: Tensor,
        z: list[Tensor],
        target: Tensor,
        *,
        multiplier: list[Tensor] | None = None,
        rho: float | Sequence[float] = 1.0,
    ) -> Tensor:
        """Puts the mean over the samples of dE/dW into `.grad` of every parameter that requires a gradient, in place of
        what was there; returns the energies (T,), sums over the samples. Nothing else is changed."""
        evaluation = self.evaluation(x, z, target, multiplier=multiplier, rho=rho)
        set_mean_gradients(self.parameters(), evaluation.gradients_of_parameters(), len(x))
        return evaluation.energies

    def largest_curvature(
        self,
        x: Tensor,
        z: list[Tensor],
        target: Tensor,
        *,
        multiplier: list[Tensor] | None = None,
        rho: float | Sequence[float] = 1.0,
        iterations: int = 10,
    ) -> float:
        """Mean over the samples of the largest eigenvalue of each sample's Hessian of E in its z, by power iteration:
        steps of 1 over it are stable, and of 2 over it are not. Nothing is changed."""

        def gradient(values: list[Tensor]) -> list[Tensor]:
            return self.hidden_gradient(x, values, target, multiplier=multiplier, rho=rho)

        return largest_curvature(gradient, z, iterations=iterations)

    # -----------------------------------------------------------------------------------------------------------------
    # How
    # -----------------------------------------------------------------------------------------------------------------

    def _check_values(
        self, x: Tensor, z: list[Tensor], multiplier: list[Tensor] | None, rho: float | Sequence[float]
    ) -> list[float]:
        """z and multiplier are what a net of T layers needs for the samples of x; rho of every hidden value."""
        n_hidden = len(self.layers) - 1
        check_hidden_values(x, z, multiplier, n_hidden, f"a net of {n_hidden + 1} layers")
        return weights_of_energy(rho, n_hidden, "hidden values")

    def _net_and_input(self, x: Tensor) -> tuple[Net, Tensor]:
        hidden_loss = hidden_loss_code(self.hidden_loss, self.kappa)
        return net_and_input(self.layers, x, self.head_loss, hidden_loss, self.kappa)

    def _visit_in_one_call_(
        self,
        layers: list[LinearLayer],
        x: Tensor,
        z: list[Tensor],
        target: Tensor,
        multiplier: list[Tensor] | None,
        optimizer: Optimizer | None,
        numbers: dict,
    ) -> Visit:
        parameters = [p for layer in layers for p in layer.parameters()]
        fused = optimizer if optimizer is not None and is_fusable(optimizer, parameters) else None
        by_gradients = optimizer if fused is None else None  # takes its step from .grad
        if by_gradients is not None:
            by_gradients.zero_grad()
        energies, residual = decoupled_step_(
            *(_like_stored(x, z), z, [layer.weight for layer in layers]),
            None if layers[0].bias is None else [layer.bias for layer in layers],
            _like_stored(target, z),
            multiplier=multiplier,
            optimizer=fused,
            head=self.head,
            H=None if self.criterion is None else self.criterion.H,
            ignore_index=-100 if self.criterion is None else self.criterion.ignore_index,
            activation=[layer.activation for layer in layers],
            preactivation=any(layer.preactivation for layer in layers if layer.activation != "identity"),
            hidden_loss=self.hidden_loss,
            kappa=self.kappa,
            skip=[layer.skip for layer in layers],
            branch_scale=[layer.branch_scale for layer in layers],
            return_residual=True,
            **numbers,
        )
        if by_gradients is not None:
            by_gradients.step()
        return Visit(energies, _norms(residual, energies), _norms(z, energies))

    def _visit_layers_(
        self,
        net: Net,
        x: Tensor,
        z: list[Tensor],
        target: Tensor,
        multiplier: list[Tensor] | None,
        optimizer: Optimizer | None,
        *,
        step_size: float,
        steps: int,
        rho: list[float],
        dual_step: float,
    ) -> Visit:
        def evaluate(dual: float, keep_buffers: bool) -> Evaluation:
            return Evaluation(net, Point([x, *z], target, multiplier, rho, dual), keep_buffers=keep_buffers)

        final = move_values_(evaluate, z, multiplier, step_size=step_size, steps=steps, dual_step=dual_step)
        if optimizer is not None:
            optimizer.zero_grad()
        set_mean_gradients(self.parameters(), final.gradients_of_parameters(), len(x))
        if optimizer is not None:
            optimizer.step()
        return Visit(final.energies, _norms(final.residuals, final.energies), _norms(z, final.energies))


def _is_one_call(net: Net, x: Tensor, head: str) -> bool:
    """Whether decoupled_step_ can make a visit of the whole net."""
    if None in net.linear or x.dim() != 2 or len(by_place_of_activation(dict(enumerate(net.linear)))) > 1:
        return False
    parameters = [p for layer in net.linear for p in layer.parameters()]
    last, n_biases = net.linear[-1], sum(layer.bias is not None for layer in net.linear)
    gives_raw_logits = last.skip == 0 and (last.preactivation or last.activation == "identity")
    return (
        n_biases in (0, len(net.linear))
        and all(p.requires_grad for p in parameters)
        and len(set(map(id, parameters))) == len(parameters)
        and (gives_raw_logits or head == "squared")
    )


def head_loss(criterion: SoftmaxInfogainLoss | None, output: Tensor, target: Tensor) -> Tensor:
    """L, summed over the samples; without a criterion it is the squared error."""
    if criterion is not None:
        return criterion(output, target)
    if target.shape != output.shape:
        raise ValueError(f"target: expected the shape of the output {tuple(output.shape)}, got {tuple(target.shape)}")
    return 0.5 * (output - target).square().sum()


def outputs_of(layers: Iterable[nn.Module], x: Tensor) -> list[Tensor]:
    """What each of the layers makes, one after the other. Buffers stay as they are."""
    values = []
    for layer in layers:
        value = call([layer], x, keep_buffers=True)
        x = value.clone() if share_storage(value, x) else value  # or a step in place would move both
        values.append(x)
    return values


def step_of_multiplier(dual_step: float | None, rho: list[float], multiplier: list[Tensor] | None) -> float:
    """Its size: by default half of the smallest rho; 0 without multipliers."""
    if dual_step is None:
        dual_step = 0.5 * min(rho, default=0.0)
    check_not_negative("dual_step", dual_step)
    return 0.0 if multiplier is None else dual_step


def check_steps(step_size: float, steps: int) -> None:
    check_not_negative("step_size", step_size)
    check_int("steps", steps)
    check_not_negative("steps", steps)


def check_hidden_values(x: Tensor, z: list[Tensor], multiplier: list[Tensor] | None, n_hidden: int, owner: str) -> None:
    """z and multiplier are lists of the owner's n_hidden tensors, for the samples of x."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a torch.Tensor, got {type(x).__name__}")
    _check_list("z", z, n_hidden, owner)
    for t, value in enumerate(z):
        if value.shape[:1] != x.shape[:1]:
            raise ValueError(f"z[{t}]: has shape {tuple(value.shape)}, but x has shape {tuple(x.shape)}")
    if multiplier is None:
        return
    _check_list("multiplier", multiplier, n_hidden, owner)
    for t, (lambda_, value) in enumerate(zip(multiplier, z, strict=True)):
        if lambda_.shape != value.shape:
            raise ValueError(f"multiplier[{t}]: has shape {tuple(lambda_.shape)}, but z[{t}] has {tuple(value.shape)}")


def _check_list(name: str, tensors: list[Tensor], n_hidden: int, owner: str) -> None:
    if not isinstance(tensors, (list, tuple)):
        raise TypeError(f"{name}: expected a list of tensors, got {type(tensors).__name__}")
    if len(tensors) != n_hidden:
        raise ValueError(f"{name}: has {len(tensors)} tensors, but {owner} has {n_hidden} hidden values")
    for t, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}[{t}]: expected a torch.Tensor, got {type(tensor).__name__}")


def _like_stored(given: Tensor, z: list[Tensor]) -> Tensor:
    """An end of the net in the dtype of z where that has 16 bits, as decoupled_step_ takes it."""
    narrow = z and z[0].dtype in (torch.bfloat16, torch.float16) and given.is_floating_point()
    return given.to(z[0].dtype) if narrow else given


def _norms(tensors: list[Tensor], energies: Tensor) -> Tensor:
    """(T-1,), in one call: in a net of 31 hidden values 62 of them would take a tenth of a visit."""
    return torch.stack(torch._foreach_norm(tensors, dtype=energies.dtype)) if tensors else energies.new_empty(0)
