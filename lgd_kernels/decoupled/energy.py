"""The energy of a decoupled net at given hidden values, and its gradients: every layer by itself, of whatever modules.

    E   = sum over samples of  L(target, zhat_T) + sum over t of  rho_t L_h(e_t) + <lambda_t, e_t>
    e_t = z_t - zhat_t,   q_t = rho_t L_h'(e_t) + lambda_t
    dE/dz_t = q_t + (what comes through layer t, which has z_t as its input)              t = 1 .. T-1

Indices in code are those of the layers: layer t makes the prediction of target t, which is z_(t+1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lgd_kernels import ops
from lgd_kernels.decoupled.layers import (
    LinearLayer,
    call,
    chain_of,
    in_precision_of,
    linear_layer,
    split_activation,
    split_input,
)
from lgd_kernels.reference import ACTIVATIONS, accumulation_dtype


class Net(NamedTuple):
    """What the energy needs to know of a net of T layers. Of layers that are never evaluated here, because another
    process has them, the chain is empty."""

    chains: list[list[nn.Module]]  # of every layer
    linear: list[LinearLayer | None]  # the same layers, where the fused ops know them
    head_loss: Callable[[Tensor, Tensor], Tensor]  # of output and target, summed over the samples
    hidden_loss: int  # a position in reference.HIDDEN_LOSSES
    kappa: float


def net_and_input(
    layers: Sequence[nn.Module | None],
    x: Tensor,
    head_loss: Callable[[Tensor, Tensor], Tensor],
    hidden_loss: int,
    kappa: float,
) -> tuple[Net, Tensor]:
    """The net as it is at present, and x behind what the first layer does without parameters, such as Flatten: needed
    once in a visit, it does not stand between x and a linear layer. Layers are None where another process has them."""
    chains = [[] if layer is None else chain_of(layer) for layer in layers]
    before, chains[0] = split_input(chains[0])
    x = call(before, x, keep_buffers=False) if before else x
    return Net(chains, [linear_layer(chain) for chain in chains], head_loss, hidden_loss, kappa), x


class Point(NamedTuple):
    """Where the energy is evaluated. Lists have T - 1 entries, which are None where no evaluated layer needs them."""

    inputs: list[Tensor | None]  # T of them: x, z_1 .. z_(T-1)
    target: Tensor
    multiplier: list[Tensor | None] | None
    rho: list[float]
    dual_step: float = 0.0  # lambda is multiplier + dual_step e


class Gradient(NamedTuple):
    """A parameter, and the gradient of the energy in it."""

    parameter: nn.Parameter
    value: Tensor


class Part(Protocol):
    """Some layers of the net, evaluated at a point. Lists have one entry for each of them."""

    where: list[int]
    energies: list[Tensor]
    residuals: list[Tensor]  # e; of hidden layers only
    pulls: list[Tensor]  # q; of hidden layers only
    deltas: list[Tensor]  # dE/d(raw logits)

    def gradients_of_inputs(self) -> list[Tensor]: ...

    def gradients_of_parameters(self, at_once: float) -> Iterator[list[Gradient]]:
        """Some layers' at a time: of so many that they take at_once bytes, if there are as many."""


class Evaluation:
    """All layers at one point, or some of them. One of the two kinds of gradients may be asked for, once.

    keep_buffers: leave buffers, such as the running statistics of BatchNorm, as they are.
    layers: which; None is all. More can be added, when their values have come.
    """

    def __init__(self, net: Net, point: Point, *, keep_buffers: bool = True, layers: Sequence[int] | None = None):
        self.net, self.point, self._keep_buffers = net, point, keep_buffers
        self._parts: list[Part] = []
        self.add(range(len(net.chains)) if layers is None else layers)

    def add(self, layers: Sequence[int]) -> None:
        """Evaluate these layers too."""
        self._parts += _parts(self.net, self.point, self._keep_buffers, layers)

    def _by_layer(self, name: str) -> dict[int, Tensor]:
        found = {t: tensor for part in self._parts for t, tensor in zip(part.where, getattr(part, name), strict=False)}
        return dict(sorted(found.items()))

    @property
    def energies(self) -> Tensor:
        """(T,): sums over the samples; the last one is the loss."""
        return torch.stack(list(self._by_layer("energies").values()))

    @property
    def residuals(self) -> list[Tensor]:
        """e_t, T - 1 of them."""
        return list(self._by_layer("residuals").values())

    @property
    def deltas(self) -> list[Tensor]:
        """dE/da_t of the raw logits a_t, for all T layers."""
        return list(self._by_layer("deltas").values())

    @property
    def pulls(self) -> dict[int, Tensor]:
        """q_(t+1) of the target of layer t."""
        return self._by_layer("pulls")

    def gradients_through_layers(self) -> dict[int, Tensor]:
        """What comes to z_t, the input of layer t > 0, through that layer."""
        found = {
            t: gradient
            for part in self._parts
            for t, gradient in zip(part.where, part.gradients_of_inputs(), strict=True)
            if t > 0
        }
        return dict(sorted(found.items()))

    def hidden_gradient(self) -> list[Tensor]:
        """dE/dz_t of the inputs of the layers (of x there is none)."""
        through = self.gradients_through_layers()
        pulls = self.pulls_of_inputs()
        return [pulls[t - 1] + gradient for t, gradient in through.items()]

    def pulls_of_inputs(self) -> dict[int, Tensor]:
        """q_(t+1) by layer t, of all that make an input of the layers."""
        return self.pulls

    def gradients_of_parameters(self) -> list[Gradient]:
        """dE/dW of every parameter that has one; several for a parameter that several layers share."""
        return [gradient for bucket in self.buckets_of_gradients() for gradient in bucket]

    def buckets_of_gradients(self, nbytes: float = math.inf) -> Iterator[list[Gradient]]:
        """The same in the same order, in buckets of whole layers with nbytes at least, except for the last one. Each is
        computed when it is asked for, so that something may be done with those before it meanwhile."""
        bucket: list[Gradient] = []
        for part in self._parts:
            for gradients in part.gradients_of_parameters(nbytes):
                bucket += gradients
                if sum(gradient.value.nbytes for gradient in bucket) >= nbytes:
                    yield bucket
                    bucket = []
        if bucket:
            yield bucket


def move_values_(
    evaluate: Callable[[float, bool], Evaluation],
    z: list[Tensor],
    multiplier: list[Tensor] | None,
    *,
    step_size: float,
    steps: int,
    dual_step: float,
) -> Evaluation:
    """`steps` steps of z and of the multipliers, in place; returns the evaluation at their end, with the dual step in
    it, for the gradients of the parameters.

    evaluate: (dual_step, keep_buffers) -> the evaluation at the present values, with lambda + dual_step e as the
        multipliers. z are those that its hidden_gradient is of, multiplier those of its residuals.
    """

    def evaluate_and_step_multiplier(dual: float, keep_buffers: bool) -> Evaluation:
        evaluation = evaluate(dual, keep_buffers)
        if dual != 0:
            for lambda_, e in zip(multiplier, evaluation.residuals, strict=True):
                lambda_.add_(e, alpha=dual)
        return evaluation

    for k in range(steps):
        gradient = evaluate_and_step_multiplier(dual_step if k > 0 else 0.0, True).hidden_gradient()
        for value, of_value in zip(z, gradient, strict=True):
            value.sub_(of_value, alpha=step_size)
    return evaluate_and_step_multiplier(dual_step if steps > 0 else 0.0, False)


def set_mean_gradients(parameters: Iterable[nn.Parameter], gradients: list[Gradient], n: int) -> None:
    """Puts sums over n samples into .grad of the parameters, as means, in place of what was there."""
    for parameter in parameters:
        parameter.grad = None
    for parameter, value in gradients:
        mean = (value / max(n, 1)).to(parameter.dtype)
        parameter.grad = mean if parameter.grad is None else parameter.grad + mean


def _parts(net: Net, point: Point, keep_buffers: bool, layers: Sequence[int]) -> list[Part]:
    """The hidden layers that the fused ops know together, in one part for each place of the activation, and every other
    layer by itself."""
    last = len(net.chains) - 1
    hidden = [t for t in layers if t < last]
    fused = {t: net.linear[t] for t in hidden if net.linear[t] is not None and point.inputs[t].dim() == 2}
    parts: list[Part] = []
    for preactivation, where in by_place_of_activation(fused).items():
        parts.append(LinearLayers(where, [fused[t] for t in where], preactivation, net, point))
    parts += [HiddenLayer(t, net, point, keep_buffers) for t in hidden if t not in fused]
    if last in layers:
        parts.append(OutputLayer(last, net, point, keep_buffers))
    return parts


def by_place_of_activation(layers: dict[int, LinearLayer]) -> dict[bool, list[int]]:
    """The layers with preactivation (True) and without (False). Those without an activation go with any."""
    places = {layer.preactivation for layer in layers.values() if layer.activation != "identity"}
    with_any = next(iter(places)) if places else False
    found: dict[bool, list[int]] = {}
    for t, layer in layers.items():
        place = with_any if layer.activation == "identity" else layer.preactivation
        found.setdefault(place, []).append(t)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Hidden layers that the fused ops know
# ---------------------------------------------------------------------------------------------------------------------


class LinearLayers:
    """Any number of hidden layers in one call of an op. With bfloat16 values the operands of the products are rounded
    to it, as in decoupled_step_."""

    def __init__(self, where: list[int], layers: list[LinearLayer], preactivation: bool, net: Net, point: Point):
        self.where, self._layers, self._preactivation = where, layers, preactivation
        for t, layer in zip(where, layers, strict=True):
            _check_shapes(t, layer, point)
        dtype = point.inputs[where[0] + 1].dtype
        wide = accumulation_dtype(dtype)
        narrow = torch.bfloat16 if dtype == torch.bfloat16 else None
        self._inputs = [point.inputs[t].detach().to(wide) for t in where]
        self._weights = [layer.weight.detach().to(narrow or layer.weight.dtype) for layer in layers]
        biases = [
            None if layer.bias is None else layer.bias.detach().to(narrow or layer.bias.dtype) for layer in layers
        ]
        targets = [point.inputs[t + 1].detach().to(wide) for t in where]
        multipliers = [None if point.multiplier is None else point.multiplier[t].detach().to(wide) for t in where]
        self._activation = [ACTIVATIONS.index(layer.activation) for layer in layers]
        self._skip, self._branch_scale = [layer.skip for layer in layers], [layer.branch_scale for layer in layers]
        energies, self.residuals, self.deltas, self.pulls = ops.decoupled_linear(
            *(self._inputs, self._weights, biases, targets, multipliers, self._activation, preactivation),
            *(net.hidden_loss, net.kappa, [point.rho[t] for t in where], self._skip, self._branch_scale),
            *([point.dual_step] * len(where), [True] * len(where), [True] * len(where)),
        )
        self.energies = list(energies.unbind())

    def _backward(
        self, chosen: slice, need_input: list[bool], need_weight: list[bool], need_bias: list[bool]
    ) -> list[list[Tensor]]:
        """Of the chosen layers."""
        no = [False] * len(need_input)
        pulls = self.pulls[chosen]
        made = (pulls, self.deltas[chosen], pulls)  # e has no part in these gradients
        options = (self._activation[chosen], self._preactivation, self._skip[chosen], self._branch_scale[chosen])
        given, needs = (self._inputs[chosen], self._weights[chosen]), (need_input, need_weight, need_bias, no, no)
        return ops.decoupled_linear_backward(*given, *made, None, *options, *needs)

    def gradients_of_inputs(self) -> list[Tensor]:
        no = [False] * len(self.where)
        return self._backward(slice(None), [t > 0 for t in self.where], no, no)[0]

    def gradients_of_parameters(self, at_once: float) -> Iterator[list[Gradient]]:
        first, nbytes = 0, 0
        for i, layer in enumerate(self._layers):
            nbytes += layer.weight.nbytes
            if nbytes >= at_once or i + 1 == len(self._layers):
                yield self._gradients_of(slice(first, i + 1))
                first, nbytes = i + 1, 0

    def _gradients_of(self, chosen: slice) -> list[Gradient]:
        layers = self._layers[chosen]
        need_weight = [layer.weight.requires_grad for layer in layers]
        need_bias = [layer.bias is not None and layer.bias.requires_grad for layer in layers]
        _, of_weight, of_bias, _, _ = self._backward(chosen, [False] * len(layers), need_weight, need_bias)
        weights = zip(layers, need_weight, of_weight, strict=True)
        biases = zip(layers, need_bias, of_bias, strict=True)
        return [Gradient(layer.weight, value) for layer, need, value in weights if need] + [
            Gradient(layer.bias, value) for layer, need, value in biases if need
        ]


def _check_shapes(t: int, layer: LinearLayer, point: Point) -> None:
    d_out, d_in = layer.weight.shape
    given, target = tuple(point.inputs[t].shape), tuple(point.inputs[t + 1].shape)
    if given[1] != d_in:
        raise ValueError(f"{_name_of_input(t)}: has shape {given}, but layer {t} has {d_in} inputs")
    if target != (given[0], d_out):
        raise ValueError(f"z[{t}]: expected shape {(given[0], d_out)}, which layer {t} makes of {given}, got {target}")


def _name_of_input(t: int) -> str:
    return "x" if t == 0 else f"z[{t - 1}]"


# ---------------------------------------------------------------------------------------------------------------------
# All other layers: with the autograd of their own modules, from delta down
# ---------------------------------------------------------------------------------------------------------------------


class _ByAutograd:
    """One layer, called with its graph: its gradients follow from delta, which is judged elsewhere."""

    def __init__(self, t: int, chain: list[nn.Module], point: Point, keep_buffers: bool):
        self.where, self._chain = [t], chain
        self._input = in_precision_of(chain, point.inputs[t].detach())
        with torch.enable_grad():
            if t > 0:
                self._input.requires_grad_()
            logits = call(chain, self._input, keep_buffers=keep_buffers)
            self._logits = logits.to(accumulation_dtype(logits.dtype))
        self.deltas: list[Tensor] = []

    def gradients_of_inputs(self) -> list[Tensor]:
        if not self._input.requires_grad:
            return [self._input.new_empty(0)]
        return list(torch.autograd.grad(self._logits, self._input, self.deltas[0]))

    def gradients_of_parameters(self, at_once: float) -> Iterator[list[Gradient]]:
        parameters = [p for p in nn.Sequential(*self._chain).parameters() if p.requires_grad]
        if parameters:
            values = torch.autograd.grad(self._logits, parameters, self.deltas[0], allow_unused=True)
            yield [Gradient(p, value) for p, value in zip(parameters, values, strict=True) if value is not None]


class HiddenLayer(_ByAutograd):
    """A layer whose output is the prediction of a hidden value."""

    def __init__(self, t: int, net: Net, point: Point, keep_buffers: bool):
        chain, activation = split_activation(net.chains[t])
        super().__init__(t, chain, point, keep_buffers)
        target = point.inputs[t + 1].detach()
        if self._logits.shape != target.shape:
            raise ValueError(
                f"z[{t}]: expected shape {tuple(self._logits.shape)}, which layer {t} makes of "
                f"{tuple(self._input.shape)}, got {tuple(target.shape)}"
            )
        logits = self._as_rows(self._logits.detach())
        multiplier = None if point.multiplier is None else self._as_rows(point.multiplier[t].detach())
        energy, *made = ops.local_residual(
            *(logits, self._as_rows(target), multiplier, None, [ACTIVATIONS.index(activation)]),
            *(net.hidden_loss, net.kappa, [point.rho[t]], [0.0], [point.dual_step], True, True),
        )
        self.energies = [energy.squeeze(0)]
        self.residuals, self.deltas, self.pulls = ([rows.view(target.shape)] for rows in made)

    def _as_rows(self, tensor: Tensor) -> Tensor:
        """(1, n, units) in the dtype of the logits, as the op takes one layer."""
        return tensor.to(self._logits.dtype).reshape(1, len(tensor), math.prod(tensor.shape[1:]))


class OutputLayer(_ByAutograd):
    """The last layer: its output goes to the head's loss."""

    def __init__(self, t: int, net: Net, point: Point, keep_buffers: bool):
        super().__init__(t, net.chains[t], point, keep_buffers)
        with torch.enable_grad():
            output = self._logits.detach().requires_grad_()
            loss = net.head_loss(output, point.target)
            self.deltas = list(torch.autograd.grad(loss, output))
        self.energies, self.residuals, self.pulls = [loss.detach()], [], []
