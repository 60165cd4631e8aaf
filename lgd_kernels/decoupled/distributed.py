"""Training of one DecoupledNetwork by many processes: each has a block of its layers and a shard of the samples.

    rank (p, s) of a mesh (layer, data) has layers a .. b-1 and the samples of shard s

It stores z_(a+1) .. z_b and their multipliers, the targets of its layers, for its samples. Within a visit z_a, the
input of its first layer, is moved by it as well, in place of the rank below, which stores it: the rank of the layer
that has a value as its input knows sooner what pulls at it from there, and of the other side it only needs q_a.

    start of a visit                      z_a goes up, from the rank that stores it
    each step of z, from both sides       q_a goes up; z_a is moved; the new z_a goes down

So a visit of n samples in K steps takes (2 K + 1) n d_a numbers over each boundary, 4 (2 K + 1) n d_a bytes in float32,
whatever the depth. z travels while all layers of the block are evaluated but the one that needs it, and q while the
gradients go back through all layers. Then the gradients of the parameters are summed over the shards, 4 bytes for every
parameter of the block, in buckets of layers: each travels while those of the next layers are computed. So do the 3 T
numbers of `Visit`, which are summed over both dimensions.

The steps are those of one process, Jacobi over all layers, so that the numbers are the same to the rounding of sums.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from lgd_kernels.decoupled.blocks import block_of, blocks_of_layers, check_parameters
from lgd_kernels.decoupled.energy import (
    Evaluation,
    Gradient,
    Net,
    Point,
    move_values_,
    net_and_input,
    set_mean_gradients,
)
from lgd_kernels.decoupled.neighbours import Neighbours, Sum, Transfer
from lgd_kernels.decoupled.network import (
    DecoupledNetwork,
    Visit,
    check_hidden_values,
    check_steps,
    head_loss,
    outputs_of,
    step_of_multiplier,
)
from lgd_kernels.decoupled.step_size import curvatures, norms_of_samples
from lgd_kernels.losses.checks import hidden_loss_code, weights_of_energy
from lgd_kernels.reference import accumulation_dtype

UP, DOWN = 1, -1
# of gradients that are summed over the shards together, at least. By 2 processes on 2 cores, where there is nothing to
# hide behind, a visit of 16 layers of 128 units took 20 ms with 256 KB, 16.5 with 1 MB, 15 with 4 MB, and 16 with all
BUCKET_BYTES = 4 << 20


class DistributedNetwork(nn.Module):
    """This rank's block of a DecoupledNetwork. Its parameters and buffers have the names that they have in the net.

        mesh = layer_data_mesh(n_layer=4, n_data=2)
        part = DistributedNetwork(net, mesh, x[:2])
        shard = part.shard(len(x))
        store = ActivationStore(len(shard), part.shapes, dtype=part.dtype)
        optimizer = torch.optim.Adam(part.parameters())
        part.visit_(x[batch], stored.z, target[batch], multiplier=stored.multiplier, optimizer=optimizer, step_size=0.1)

    That is one visit; `fit` trains it over epochs.

    Every method that takes x is called by all ranks at the same time, with the minibatch's samples of their own shard.
    There may be more of them in one shard than in another. Means are over the samples of all shards.

    Normalisation over the samples (BatchNorm) sees those of one shard, of which it refuses a single one, and its
    running statistics are those of the first shard, as in torch.nn.parallel.DistributedDataParallel.

    Args:
        net: the same on every rank but for the values of its parameters, which are those of the first shard's ranks.
            This rank keeps the layers of its own block alone; the net itself may be deleted.
        mesh: of two dimensions, "layer" and "data", see `layer_data_mesh`.
        x: a few samples, which tell the shapes of hidden values.

    Attributes:
        layers: nn.ModuleDict of this rank's layers, by their place in the net.
        block: range of these places. n_layers: of the whole net.
        shapes, dtype: of the hidden values that this rank stores, as ActivationStore takes them.
        mesh: as given.

    Raises:
        ValueError: a mesh of other dimensions, or with more blocks than layers; a parameter of layers in two blocks.
        RuntimeError, here and in every method: a rank is dead, or slower than the timeout of the mesh.
    """

    def __init__(self, net: DecoupledNetwork, mesh: DeviceMesh, x: Tensor):
        super().__init__()
        self.n_layers, self.mesh = len(net.layers), mesh
        blocks = blocks_of_layers(mesh, self.n_layers)
        check_parameters(net, blocks)
        self.block = blocks[mesh.get_local_rank("layer")]
        self.layers = nn.ModuleDict({str(t): net.layers[t] for t in self.block})
        self.criterion = net.criterion if self._has_head else None
        self._hidden_loss, self._kappa = hidden_loss_code(net.hidden_loss, net.kappa), net.kappa
        values = net.hidden_values(x)
        shapes = [tuple(value.shape[1:]) for value in values]
        self.shapes = shapes[self.block.start : self.block.stop]
        self._shape_of_input = shapes[self.block.start - 1] if self.block.start > 0 else None
        self.dtype = accumulation_dtype(values[0].dtype if values else x.dtype)
        self._block_of = {name: block_of(name, blocks) for name in net.state_dict()}
        self._described = {name: value.to("meta") for name, value in net.state_dict().items()}
        self._neighbours = Neighbours(mesh)
        with torch.no_grad():
            self._neighbours.first_of_data_(list(self.state_dict().values()), "the parameters")

    @property
    def _has_head(self) -> bool:
        return self.block.stop == self.n_layers

    def shard(self, n_samples: int) -> range:
        """The samples of this rank among n_samples: in the order of the data set, as DTensor's Shard(0) has them."""
        n_shards, place = self.mesh.size(1), self.mesh.get_local_rank("data")
        size = -(-n_samples // n_shards)
        return range(min(place * size, n_samples), min((place + 1) * size, n_samples))

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor | None:
        """The output of the ordinary net, without a graph, on the ranks that have the last layer; None on the others.
        Each block waits for the one below it. x as in `visit_`. Buffers stay as they are."""
        values = self._feed_forward(self.layers.values(), x)
        return values[-1] if self._has_head else None

    def head_loss(self, output: Tensor, target: Tensor) -> Tensor:
        """L, summed over the samples, from what `forward` returned."""
        return head_loss(self.criterion, output, target)

    def total(self, numbers: Tensor) -> Tensor:
        """The sum over all ranks of a tensor, which has the same shape on each."""
        (numbers,) = self._neighbours.sum_over_data([numbers], "the numbers")
        return self._neighbours.sum_over_layers([numbers], "the numbers")[0]

    def n_samples(self, n: int) -> int:
        """The number of samples of all shards, of which this one has n."""
        device = next(self.parameters()).device
        (total,) = self._neighbours.sum_over_data([torch.tensor(n, device=device)], "the numbers of samples")
        return int(total)

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
        """`DecoupledNetwork.visit_` for this rank's samples and layers; returns the `Visit` of all samples and layers.

        Args:
            x: (n, ...), this shard's samples of the minibatch; where the rank has not the first layer, anything with n
                rows.
            z, multiplier: of this rank, as in `shapes`, in `dtype` and contiguous; moved in place.
            target: likewise; where the rank has not the last layer, it is not looked at.
            step_size, steps, rho, dual_step: as there, the same on every rank; rho of the whole net.
            optimizer: of this rank's parameters.
        """
        values = self._values(x, z, target, multiplier, rho)
        check_steps(step_size, steps)
        dual_step = step_of_multiplier(dual_step, values.rho, multiplier)
        numbers = {"step_size": step_size, "steps": steps, "dual_step": dual_step}
        final = move_values_(values.evaluate, values.moved, multiplier, **numbers)
        self._neighbours.all_sent()
        if optimizer is not None:
            optimizer.zero_grad()
        visit = self._reduce_(final, z, len(x))
        if optimizer is not None:
            optimizer.step()
        return visit

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
        """dE/dz_t of the values that this rank stores, in their shapes. Nothing is changed."""
        values = self._values(x, z, target, multiplier, rho)
        gradients = values.evaluate(0.0, True).hidden_gradient()
        if self._neighbours.below:
            self._neighbours.send(gradients.pop(0), f"the gradient of {_name(self.block.start)}", DOWN)
        if self._neighbours.above:
            name = f"the gradient of {_name(self.block.stop)}"
            gradients.append(self._neighbours.receive(torch.empty_like(z[-1]), name, UP).wait())
        self._neighbours.all_sent()
        return gradients

    @torch.no_grad()
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
        """As `DecoupledNetwork.largest_curvature`, over the samples of all shards."""

        def gradient(values: list[Tensor]) -> list[Tensor]:
            return self.hidden_gradient(x, values, target, multiplier=multiplier, rho=rho)

        def norms(values: list[Tensor]) -> Tensor:
            """Over the layers of all ranks; some have no hidden values of their own."""
            ours = norms_of_samples(values).square() if values else self._empty_input(x).new_zeros(len(x))
            return self._neighbours.sum_over_layers([ours], "the norms of the samples")[0].sqrt()

        of_samples = curvatures(gradient, z, norms, iterations=iterations, first=self.block.start)
        sums = [of_samples.sum(), of_samples.new_tensor(float(len(x)))]
        total, n = self._neighbours.sum_over_data(sums, "the curvatures")
        return float(total / n.clamp_min(1))

    @torch.no_grad()
    def hidden_values(self, x: Tensor) -> list[Tensor]:
        """The values that this rank stores, of the ordinary net. Each block waits for the one below it. x as in
        `visit_`. Buffers stay as they are."""
        hidden = [layer for t, layer in zip(self.block, self.layers.values(), strict=True) if t + 1 < self.n_layers]
        return self._feed_forward(hidden, x)

    def _feed_forward(self, layers: Iterable[nn.Module], x: Tensor) -> list[Tensor]:
        """What these layers of the block make, the first of it included."""
        if self._neighbours.below:
            x = self._neighbours.receive(self._empty_input(x), _name(self.block.start), DOWN).wait()
        values = outputs_of(layers, x)
        if self._neighbours.above:
            self._neighbours.send(values[-1], _name(self.block.stop), UP)
        self._neighbours.all_sent()
        return values

    @torch.no_grad()
    def full_state_dict(self) -> dict[str, Tensor]:
        """The state_dict of the whole net on every rank, for `DecoupledNetwork.load_state_dict`; copies."""
        ours, device = self.state_dict(), self.mesh.device_type
        whole = {}
        for name, described in self._described.items():
            mine = ours.get(name)
            whole[name] = torch.empty_like(described, device=device) if mine is None else mine.clone()
            self._neighbours.of_block_([whole[name]], self._block_of[name], name)
        return whole

    # -----------------------------------------------------------------------------------------------------------------
    # How
    # -----------------------------------------------------------------------------------------------------------------

    def _values(
        self,
        x: Tensor,
        z: list[Tensor],
        target: Tensor,
        multiplier: list[Tensor] | None,
        rho: float | Sequence[float],
    ) -> _BlockValues:
        first, last = self.block.start, self.block.stop - 1
        check_hidden_values(x, z, multiplier, len(self.shapes), f"the block of layers {first} to {last}")
        for t, value in enumerate(z):
            if value.dtype != self.dtype:
                raise TypeError(f"z[{t}]: expected {self.dtype}, got {value.dtype}")
            if not value.is_contiguous():
                raise ValueError(f"z[{t}]: expected a contiguous tensor, got strides {value.stride()}")
        rhos = weights_of_energy(rho, self.n_layers - 1, "hidden values")
        return _BlockValues(self, x, z, target, multiplier, rhos)

    def _empty_input(self, x: Tensor) -> Tensor:
        """Room for the input of the first layer, which the rank below stores."""
        device = next(self.parameters()).device
        return torch.empty(len(x), *self._shape_of_input, dtype=self.dtype, device=device)

    def _reduce_(self, final: Evaluation, z: list[Tensor], n: int) -> Visit:
        """Puts the means over the samples of all shards into `.grad`."""
        energies = final.energies
        logs = energies.new_zeros(3, self.n_layers)
        logs[0, self.block.start : self.block.stop] = energies
        if z:
            where = slice(self.block.start, self.block.start + len(z))
            logs[1, where] = torch.stack(torch._foreach_norm(final.residuals, dtype=logs.dtype)).square()
            logs[2, where] = torch.stack(torch._foreach_norm(z, dtype=logs.dtype)).square()
        sums = self._neighbours.begin_sum_over_data([logs, logs.new_tensor(float(n))], "the energies")
        buckets = [(bucket, self._begin_sum(bucket)) for bucket in final.buckets_of_gradients(BUCKET_BYTES)]
        logs, n_all = sums.wait()
        (logs,) = self._neighbours.sum_over_layers([logs], "the energies")
        gradients = [
            gradient._replace(value=value)
            for bucket, sums in buckets
            for gradient, value in zip(bucket, sums.wait(), strict=True)
        ]
        set_mean_gradients(self.parameters(), gradients, int(n_all))
        self._neighbours.first_of_data_(list(self.layers.buffers()), "the buffers")
        return Visit(logs[0], logs[1, :-1].sqrt(), logs[2, :-1].sqrt())

    def _begin_sum(self, gradients: list[Gradient]) -> Sum:
        return self._neighbours.begin_sum_over_data([value for _, value in gradients], "the gradients")


class _BlockValues:
    """The values of a visit, as the rank of a block has them, and their evaluation together with its neighbours.

    Attributes: moved: z_a .. z_(b-1), without x, which this rank moves; rho: T-1 of them.
    """

    def __init__(
        self,
        part: DistributedNetwork,
        x: Tensor,
        z: list[Tensor],
        target: Tensor,
        multiplier: list[Tensor] | None,
        rho: list[float],
    ):
        self._neighbours, self._block, self.rho = part._neighbours, part.block, rho
        layers = [part.layers[str(t)] if t in part.block else None for t in range(part.n_layers)]
        loss = partial(head_loss, part.criterion)
        self._net, x = net_and_input(layers, x, loss, part._hidden_loss, part._kappa)
        self._target, first = target, part.block.start
        self._inputs: list[Tensor | None] = [None] * (part.n_layers + 1)
        self._inputs[first] = part._empty_input(x) if self._neighbours.below else x
        self._inputs[first + 1 : first + 1 + len(z)] = z
        self._multiplier = None
        if multiplier is not None:
            self._multiplier = [None] * part.n_layers
            self._multiplier[first : first + len(z)] = multiplier
        self.moved = [self._inputs[t] for t in part.block if t > 0]
        self._have_moved = False

    def evaluate(self, dual_step: float, keep_buffers: bool) -> _BlockEvaluation:
        """At the present values. One more layer's waits until all others are done."""
        arriving, waiting = self._begin_to_exchange_values()
        layers = [t for t in self._block if arriving is None or t != waiting]
        point = Point(self._inputs, self._target, self._multiplier, self.rho, dual_step)
        evaluation = _BlockEvaluation(self._net, point, layers, self._block, self._neighbours, keep_buffers)
        if arriving is not None:
            arriving.wait()
            evaluation.add([waiting])
        return evaluation

    def _begin_to_exchange_values(self) -> tuple[Transfer | None, int]:
        """(the value on its way to this rank, the layer that needs it): first the input of the lowest layer, from the
        rank that stores it, then after every step the target of the highest, from the rank that moved it."""
        first, last = self._block.start, self._block.stop - 1
        lowest, highest = (self._neighbours.below, first, DOWN, first), (self._neighbours.above, last + 1, UP, last)
        give, take = (lowest, highest) if self._have_moved else (highest, lowest)
        self._have_moved = True
        exists, t, direction, _ = give
        if exists:
            self._neighbours.send(self._inputs[t], _name(t), direction)
        exists, t, direction, waiting = take
        return self._neighbours.receive(self._inputs[t], _name(t), direction) if exists else None, waiting


class _BlockEvaluation(Evaluation):
    """The layers of a block; the gradient of its first input has a part from the rank below."""

    def __init__(
        self,
        net: Net,
        point: Point,
        layers: Sequence[int],
        block: range,
        neighbours: Neighbours,
        keep_buffers: bool,
    ):
        super().__init__(net, point, keep_buffers=keep_buffers, layers=layers)
        self._block, self._neighbours = block, neighbours
        self._arriving: Transfer | None = None

    def hidden_gradient(self) -> list[Tensor]:
        """dE/dz_a .. dE/dz_(b-1)."""
        first, last = self._block.start, self._block.stop - 1
        if self._neighbours.above:
            self._neighbours.send(self.pulls[last], f"q_{last + 1}", UP)
        if self._neighbours.below:
            pull = torch.empty_like(self.point.inputs[first])
            self._arriving = self._neighbours.receive(pull, f"q_{first}", DOWN)
        gradient = super().hidden_gradient()
        self._neighbours.all_sent()
        return gradient

    def pulls_of_inputs(self) -> dict[int, Tensor]:
        if self._arriving is None:
            return self.pulls
        return self.pulls | {self._block.start - 1: self._arriving.wait()}


def _name(t: int) -> str:
    return f"z_{t}"
