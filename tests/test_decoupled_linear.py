"""decoupled_linear, every backend, against the equations in extended precision (layer_oracle.py), and against what is
known exactly about decoupled nets."""

from __future__ import annotations

import functools

import pytest
import torch
from cases import DTYPES, dtype_name
from device import DEVICE, serving
from layer_oracle import (
    ACTIVATIONS,
    HIDDEN_LOSSES,
    PLAIN,
    assert_layers,
    exact_layers,
    exact_linear,
    plain_layers,
    plain_linear,
)
from torch.autograd import gradcheck, gradgradcheck

import lgd_kernels as lgd
from lgd_kernels import backends, ops, reference

SERVED_BY = serving("decoupled_linear")
NAMES = ("z", "weight", "bias", "target", "multiplier")
NAN = float("nan")
by_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
by_hidden_loss = pytest.mark.parametrize("hidden_loss", HIDDEN_LOSSES)
by_preactivation = pytest.mark.parametrize("preactivation", [False, True], ids=["post", "pre"])
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)


@pytest.fixture(params=SERVED_BY)
def backend(request, nan_prefill):
    with backends.force(request.param):
        yield


def make(T, n, d_in, d_out, dtype=torch.float64, bias=True, multiplier=True):
    """The tensors in the order of NAMES, all of them requiring grad."""
    shapes = ((T, n, d_in), (T, d_out, d_in), (T, d_out), (T, n, d_out), (T, n, d_out))
    wanted = (True, True, bias, True, multiplier)
    tensors = [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]
    return [x if want else None for x, want in zip(tensors, wanted, strict=True)]


def loss(z, weight, bias, target, multiplier, **options):
    return lgd.decoupled_linear_loss(z, weight, bias, target, multiplier=multiplier, **options)


def forward_op(z, weight, bias, target, multiplier, *options):
    """(energy, e, delta, q) of one stack; the options end in need_residual and need_gradient."""
    *options, need_residual, need_gradient = options
    stacks = ([x] for x in (z, weight, bias, target, multiplier))
    energy, (e,), (delta,), (q,) = ops.decoupled_linear(*stacks, *options, [need_residual], [need_gradient])
    return energy, e, delta, q


def backward_op(z, weight, e, delta, q, grad_energy, *options):
    """The gradients of one stack; the options end in whether each is needed, in the order of NAMES."""
    *options, need_z, need_weight, need_bias, need_target, need_multiplier = options
    needs = ([need] for need in (need_z, need_weight, need_bias, need_target, need_multiplier))
    stacks = ([x] for x in (z, weight, e, delta, q))
    return [gradient for (gradient,) in ops.decoupled_linear_backward(*stacks, grad_energy, *options, *needs)]


def for_every_layer(T, **options):
    """Options of the loss, as the oracle wants them: one dictionary for each layer."""
    defaults = {"activation": "tanh", "preactivation": False, "hidden_loss": "squared", "kappa": 1.0, "rho": 1.0}
    options = defaults | {"skip": 0.0, "branch_scale": 1.0} | options
    lists = {name: value if isinstance(value, list) else [value] * T for name, value in options.items()}
    return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]


def check(tensors, **options):
    """Energies, and all gradients for an upstream gradient of its own for every layer."""
    T, dtype = len(tensors[0]), tensors[0].dtype
    energies, per_layer = loss(*tensors, **options), for_every_layer(T, **options)
    exact, plain = exact_layers(exact_linear, tensors, per_layer), plain_layers(plain_linear, tensors, per_layer)
    assert energies.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_layers(energies, exact["energy"], plain, dtype, "energy")

    given = [x for x in tensors if x is not None]
    upstream = torch.linspace(-1, 2, T, dtype=energies.dtype)
    grads = torch.autograd.grad(energies, given, upstream)
    plain = torch.autograd.grad(plain, given, upstream)
    names = [name for name, x in zip(NAMES, tensors, strict=True) if x is not None]
    for name, grad, of_plain in zip(names, grads, plain, strict=True):
        assert grad.dtype == dtype
        expected = upstream.numpy(force=True).reshape(-1, *[1] * (exact[name].ndim - 1)) * exact[name]
        assert_layers(grad, expected, of_plain, dtype, f"gradient of {name}")


# ---------------------------------------------------------------------------------------------------------------------
# Values and first derivatives
# ---------------------------------------------------------------------------------------------------------------------


@by_dtype
@by_hidden_loss
@by_preactivation
@by_activation
def test_energies_and_gradients(backend, activation, preactivation, hidden_loss, dtype):
    options = {"activation": activation, "preactivation": preactivation, "hidden_loss": hidden_loss}
    check(make(3, 6, 5, 5, dtype), **options, kappa=0.7, rho=0.8, skip=1.0, branch_scale=0.4)


@by_preactivation
@pytest.mark.parametrize("given", ["bias", "multiplier", "neither"])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 1, 9, 3), (4, 33, 65, 17), (2, 130, 16, 40)])
def test_unequal_widths_and_optional_tensors(backend, sizes, given, preactivation):
    tensors = make(*sizes, torch.float32, bias=given == "bias", multiplier=given == "multiplier")
    check(tensors, preactivation=preactivation, activation="scaled_tanh", branch_scale=sizes[2] ** -0.5)


def test_options_of_their_own_for_every_layer(backend):
    check(
        make(4, 7, 6, 6, torch.float32),
        activation=["relu", "gelu", "identity", "sigmoid"],
        rho=[1.0, 0.0, 2.5, 0.1],
        skip=[0.0, 1.0, 0.5, -1.0],
        branch_scale=[1.0, 0.3, -0.2, 0.0],
        hidden_loss="huber",
        kappa=0.4,
    )


def assert_near(got, expected, dtype, what):
    """Sums of a few products in the accumulation dtype, operands and results rounded to `dtype`."""
    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    expected = torch.as_tensor(expected.astype(float))
    allowed = (16 * torch.finfo(accumulated).eps + 4 * torch.finfo(dtype).eps) * expected.abs().max()
    assert (got.double() - expected).abs().max() <= allowed, what


@by_preactivation
@by_dtype
def test_outputs_on_request_and_the_step_of_the_multiplier(backend, dtype, preactivation):
    tensors = [x.detach() for x in make(3, 6, 5, 5, dtype)]
    numbers = {"rho": [1.0, 2.0, 0.0], "skip": [0.0, 1.0, 0.5], "branch_scale": [1.0, 0.5, 0.2]}
    activation, dual_step = ["gelu", "relu", "tanh"], [0.0, 0.5, 1.5]
    named = {"activation": activation, "preactivation": preactivation, "hidden_loss": "huber", "kappa": 0.5}
    per_layer = [o | {"dual_step": a} for o, a in zip(for_every_layer(3, **named, **numbers), dual_step, strict=True)]
    exact = exact_layers(exact_linear, tensors, per_layer)
    codes = [reference.ACTIVATIONS.index(name) for name in activation]
    call = functools.partial(forward_op, *tensors, codes, preactivation, 1, 0.5, *numbers.values(), dual_step)
    outputs = call(True, True)
    for name, got in zip(("energy", "e", "delta", "q"), outputs, strict=True):
        assert_near(got, exact[name], dtype, name)
    for need_residual, need_gradient in ((False, False), (True, False), (False, True)):
        wanted = (True, need_residual, need_gradient, need_gradient)
        for got, full, want in zip(call(need_residual, need_gradient), outputs, wanted, strict=True):
            assert torch.equal(got, full if want else full.new_empty(0))


@by_preactivation
@by_dtype
def test_backward_op(backend, dtype, preactivation):
    """Any delta can be carried on; without grad_energy it counts as 1; only what is asked for is made."""
    z, weight, _, delta, q = (x.detach() for x in make(3, 6, 5, 5, dtype))
    e = torch.randn_like(q)
    activation, skip, scale = ["gelu", "relu", "tanh"], [0.0, 1.0, 0.5], [1.0, 0.5, 0.2]
    codes = [reference.ACTIVATIONS.index(name) for name in activation]
    call, everything = functools.partial(backward_op, z, weight, e, delta, q), [True] * 5
    outputs = call(None, codes, preactivation, skip, scale, *everything)
    upstream = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    scaled = call(upstream, codes, preactivation, skip, scale, *everything)
    for t in range(3):
        x = z[t].double().requires_grad_()
        phi = PLAIN[activation[t]](x) if preactivation else x
        branch = scale[t] * delta[t].double() @ weight[t].double()
        (grad_z,) = torch.autograd.grad(phi, x, branch)
        expected = (
            grad_z - skip[t] * q[t].double(),
            scale[t] * delta[t].double().t() @ phi.detach(),
            delta[t].double().sum(0),
            q[t].double(),
            e[t].double(),
        )
        for name, got, times, wanted in zip(NAMES, outputs, scaled, expected, strict=True):
            assert_near(got[t], wanted.numpy(force=True), dtype, name)
            assert_near(times[t], upstream[t].item() * wanted.numpy(force=True), dtype, name)
    for i in range(5):
        needs = [j == i for j in range(5)]
        for j, got in enumerate(call(None, codes, preactivation, skip, scale, *needs)):
            assert torch.equal(got, outputs[j] if j == i else outputs[j].new_empty(0))


@by_preactivation
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_name)
@pytest.mark.parametrize("sizes", [(5, 7, 9), (33, 65, 17), (64, 64, 64)])
def test_a_stack_of_layers_equals_its_layers_bit_for_bit(backend, sizes, dtype, preactivation):
    """With odd sizes, so that the layers of a stack start at every alignment."""
    options = {"activation": "tanh", "preactivation": preactivation, "branch_scale": 0.3}
    tensors = make(4, *sizes, dtype)
    energies = loss(*tensors, **options)
    grads = torch.autograd.grad(energies.sum(), tensors)
    for t in range(4):
        layer = [x[t : t + 1].detach().clone().requires_grad_() for x in tensors]
        energy = loss(*layer, **options)
        assert torch.equal(energy, energies[t : t + 1])
        for grad, of_stack in zip(torch.autograd.grad(energy.sum(), layer), grads, strict=True):
            assert torch.equal(grad[0], of_stack[t])


def test_twice_the_same_bits(backend):
    tensors = make(3, 70, 33, 40, torch.float32)
    first, second = (torch.autograd.grad(loss(*tensors).sum(), tensors) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_permuted_batch_and_duplicated_sample(backend):
    """A sample's gradients do not depend on its place nor on its neighbours, and those of the weights are sums."""
    tensors = make(3, 6, 5, 5, torch.float32)
    options = {"activation": "relu", "preactivation": True, "skip": 1.0}
    order = torch.tensor([3, 0, 5, 1, 4, 2, 0])  # sample 0 twice
    chosen = [x if x.dim() == 2 or i == 1 else x[:, order] for i, x in enumerate(tensors)]
    chosen = [x.detach().requires_grad_() for x in chosen]
    grads = torch.autograd.grad(loss(*tensors, **options).sum(), tensors)
    of_chosen = torch.autograd.grad(loss(*chosen, **options).sum(), chosen)
    for i in (0, 3, 4):  # z, target, multiplier
        torch.testing.assert_close(of_chosen[i], grads[i][:, order])
    extra = [x if x.dim() == 2 or i == 1 else x[:, :1] for i, x in enumerate(tensors)]
    extra = [x.detach().requires_grad_() for x in extra]
    of_extra = torch.autograd.grad(loss(*extra, **options).sum(), extra)
    for i in (1, 2):  # weight, bias
        torch.testing.assert_close(of_chosen[i], grads[i] + of_extra[i])


@pytest.mark.parametrize("sizes", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4), (2, 3, 4, 0)])
def test_size_zero(backend, sizes):
    tensors = make(*sizes)
    energies = loss(*tensors)
    assert energies.shape == (sizes[0],)
    if sizes[2] > 0:
        assert torch.equal(energies, torch.zeros(sizes[0], dtype=torch.float64))
    for grad, x in zip(torch.autograd.grad(energies.sum(), tensors), tensors, strict=True):
        assert grad.shape == x.shape and grad.isfinite().all()
        if 0 in (*sizes[1:2], sizes[3]):
            assert not grad.any()  # nothing depends on anything


@by_preactivation
@by_dtype
@pytest.mark.parametrize(("d_in", "d_out"), [(0, 4), (3, 0)])
def test_width_zero_after_other_layers(backend, d_in, d_out, dtype, preactivation):
    """What other layers left in the working space does not show."""
    check(make(2, 70, 5, 5, dtype), preactivation=preactivation)
    check(make(2, 70, d_in, d_out, dtype), preactivation=preactivation)


@by_preactivation
def test_strides(backend, preactivation):
    dense = make(3, 6, 8, 8, torch.float32)
    strided = [
        dense[0].detach().transpose(0, 1).contiguous().transpose(0, 1),
        dense[1].detach().transpose(1, 2).contiguous().transpose(1, 2),
        dense[2].detach().repeat_interleave(3, dim=1)[:, ::3],
        dense[3].detach().transpose(0, 2).contiguous().transpose(0, 2),
        dense[4].detach()[:, :1].expand(3, 6, 8),
    ]
    dense[4] = strided[4].contiguous().requires_grad_()
    strided = [x.requires_grad_() for x in strided]
    expected = loss(*dense, preactivation=preactivation, skip=1.0)
    energies = loss(*strided, preactivation=preactivation, skip=1.0)
    torch.testing.assert_close(energies, expected)
    expected = torch.autograd.grad(expected.sum(), dense)
    torch.testing.assert_close(torch.autograd.grad(energies.sum(), strided), expected)


def test_stored_values_as_inputs_and_targets(backend):
    """z and target are two views of one tensor of hidden values, which then receives both gradients."""
    hidden = torch.randn(4, 5, 6, requires_grad=True)
    weight = torch.randn(3, 6, 6)
    lgd.decoupled_linear_loss(hidden[:-1], weight, None, hidden[1:], skip=1.0).sum().backward()
    z, target = hidden.detach()[:-1].requires_grad_(), hidden.detach()[1:].requires_grad_()
    lgd.decoupled_linear_loss(z, weight, None, target, skip=1.0).sum().backward()
    zero = torch.zeros(1, 5, 6)
    torch.testing.assert_close(hidden.grad, torch.cat([z.grad, zero]) + torch.cat([zero, target.grad]))


@by_preactivation
@by_activation
def test_nan_goes_through(backend, activation, preactivation):
    """A NaN in one sample of one layer shows in that layer's energy and in that sample's gradients."""
    tensors = make(2, 3, 4, 4)
    with torch.no_grad():
        tensors[0][0, 1, 2] = NAN
    energies = loss(*tensors, activation=activation, preactivation=preactivation, hidden_loss="huber", skip=1.0)
    assert energies.isnan().tolist() == [True, False]
    expected = torch.zeros(2, 3, 4, dtype=torch.bool)
    expected[0, 1] = True
    for i, grad in enumerate(torch.autograd.grad(energies.sum(), tensors)):
        if i in (0, 3, 4):
            assert torch.equal(grad.isnan(), expected)
        else:
            assert grad[0].isnan().all() and not grad[1].isnan().any()


def test_inputs_are_not_modified(backend):
    tensors = make(2, 3, 4, 4)
    before = [x.detach().clone() for x in tensors]
    torch.autograd.grad(loss(*tensors, skip=1.0).sum(), tensors)
    assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True))


def test_gradients_that_are_not_needed_are_not_made(backend):
    for needed in range(5):
        tensors = [x.detach().requires_grad_(i == needed) for i, x in enumerate(make(2, 3, 4, 4))]
        loss(*tensors, skip=1.0).sum().backward()
        assert [x.grad is not None for x in tensors] == [i == needed for i in range(5)]


# ---------------------------------------------------------------------------------------------------------------------
# Lists of tensors
# ---------------------------------------------------------------------------------------------------------------------


def make_lists(dtype=torch.float64):
    """Layers 4 -> 6 -> 6 -> 3, the last with another number of samples; some without bias or multiplier."""
    layers = [make(1, n, d_in, d_out, dtype) for n, d_in, d_out in ((5, 4, 6), (5, 6, 6), (2, 6, 3))]
    lists = [[x.detach()[0].requires_grad_() for x in tensors] for tensors in zip(*layers, strict=True)]
    lists[2][1], lists[4][2] = None, None
    return lists


def given_of(lists):
    return [x for tensors in lists for x in tensors if x is not None]


@by_preactivation
def test_lists_of_unequal_layers(backend, preactivation):
    lists = make_lists()
    named = {"activation": ["relu", "tanh", "gelu"], "skip": [0.0, 1.0, 0.0], "rho": [1.0, 2.0, 0.5]}
    energies, given = loss(*lists, **named, preactivation=preactivation), given_of(lists)
    grads = torch.autograd.grad(energies.sum(), given)
    per_layer = for_every_layer(3, **named, preactivation=preactivation)
    plain = torch.stack(
        [plain_linear(*layer, **options) for layer, options in zip(zip(*lists, strict=True), per_layer, strict=True)]
    )
    torch.testing.assert_close(energies, plain)
    torch.testing.assert_close(grads, torch.autograd.grad(plain.sum(), given))


def test_lists_of_equal_layers_are_the_stack(backend):
    tensors = make(3, 5, 6, 6, torch.float32)
    assert torch.equal(loss(*(list(x) for x in tensors)), loss(*tensors))
    z, weight, _, target, _ = tensors
    assert torch.equal(loss(tuple(z), tuple(weight), None, tuple(target), None), loss(z, weight, None, target, None))


# The last mix keeps no two threads busy as whole layers, so that its layers are cut.
MIXES = [
    [(5, 4, 6), (5, 6, 6), (2, 6, 3)],
    [(64, 64, 64)] * 4,
    [(130, 70, 33), (130, 33, 33), (0, 3, 2), (3, 0, 2), (3, 2, 0)],
    [(3, 4, 4), (200, 130, 140), (3, 4, 4)],
]


@by_preactivation
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_name)
@pytest.mark.parametrize("sizes", MIXES, ids=str)
def test_a_list_of_layers_equals_its_layers_bit_for_bit(backend, sizes, dtype, preactivation):
    layers = [[x[0].detach().requires_grad_() for x in make(1, *of_layer, dtype)] for of_layer in sizes]
    lists = [list(tensors) for tensors in zip(*layers, strict=True)]
    lists[2][1] = lists[4][-1] = None
    T = len(sizes)
    rho, scale = [0.5 + t for t in range(T)], [1.0 / (1 + t) for t in range(T)]
    activation, upstream = ["tanh", "gelu", "relu", "silu", "identity"][:T], torch.linspace(1, 2, T, dtype=dtype)
    named = {"preactivation": preactivation, "hidden_loss": "huber", "kappa": 0.7}
    energies = loss(*lists, **named, activation=activation, rho=rho, branch_scale=scale)
    grads = iter(torch.autograd.grad(energies, given_of(lists), upstream))
    of_list = [[None if x is None else next(grads) for x in tensors] for tensors in lists]
    for t in range(T):
        layer = [[tensors[t]] for tensors in lists]
        energy = loss(*layer, **named, activation=activation[t], rho=rho[t], branch_scale=scale[t])
        assert torch.equal(energy, energies[t : t + 1])
        expected = torch.autograd.grad(energy, given_of(layer), upstream[t : t + 1])
        assert all(map(torch.equal, expected, [x[t] for x in of_list if x[t] is not None]))


def test_one_call_forward_and_one_backward_for_a_list(backend):
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    lists = make_lists()
    with Watch():
        torch.autograd.grad(loss(*lists).sum(), given_of(lists))
    assert [f for f in seen if f.namespace == "lgd_kernels"] == [ops.decoupled_linear, ops.decoupled_linear_backward]
    others = [f for f in seen if f.namespace != "lgd_kernels" and f is not torch.ops.aten.detach.default]
    assert len(others) <= 4  # the sum and its backward, but nothing for every layer


def test_gradients_that_some_layers_do_not_need(backend):
    lists = make_lists()
    lists[0][0] = lists[0][0].detach()  # the net's input
    for tensors in lists[:4]:
        tensors[2] = tensors[2].detach()  # the last layer needs none at all
    needed = [x for x in given_of(lists) if x.requires_grad]
    energies = loss(*lists, activation="gelu")
    energies.sum().backward()
    layers, per_layer = zip(*lists, strict=True), for_every_layer(3, activation="gelu")
    plain = torch.stack([plain_linear(*x, **o) for x, o in zip(layers, per_layer, strict=True)])
    torch.testing.assert_close([x.grad for x in needed], list(torch.autograd.grad(plain.sum(), needed)))


def test_stacks_and_layers_in_one_call_of_the_ops(backend):
    """How layers are cut into stacks does not matter."""
    z, weight, bias, target, multiplier = (x.detach() for x in make(4, 6, 5, 5, torch.float32))
    activation, numbers = [1, 2, 6, 5], ([1.0, 0.0, 2.0, 0.5], [0.0, 1.0, 0.5, -1.0], [1.0, 0.3, -0.2, 0.7])
    upstream, every = torch.tensor([1.0, 2.0, -1.0, 0.5]), [True] * 3

    def cut(x):
        return [x[:2], x[2], x[3:]]

    options = (activation, True, 1, 0.5, *numbers, [0.0, 0.5, 1.0, 0.0])
    energy, *made = ops.decoupled_linear(*map(cut, (z, weight, bias, target, multiplier)), *options, every, every)
    expected, *of_stack = forward_op(z, weight, bias, target, multiplier, *options, True, True)
    assert torch.equal(energy, expected)
    for got, stack in zip(made, of_stack, strict=True):
        assert all(map(torch.equal, got, cut(stack)))
    options = (upstream, activation, True, *numbers[1:])
    grads = ops.decoupled_linear_backward(cut(z), cut(weight), *made, *options, *[every] * 5)
    for got, stack in zip(grads, backward_op(z, weight, *of_stack, *options, *[True] * 5), strict=True):
        assert all(map(torch.equal, got, cut(stack)))


# ---------------------------------------------------------------------------------------------------------------------
# What is known exactly about decoupled nets
# ---------------------------------------------------------------------------------------------------------------------


@by_preactivation
@by_activation
def test_backpropagation_is_the_equilibrium_at_the_feed_forward_values(backend, activation, preactivation):
    """With z of the feed-forward pass and lambda = -dL/dz, dE/dz is 0 and dE/dW is backpropagation's."""
    T, n, d, skip, scale = 4, 5, 6, 0.8, 0.5
    phi, f = (activation, "identity") if preactivation else ("identity", activation)
    weight, bias = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((T, d, d), (T, d)))
    head, labels = torch.randn(3, d, dtype=torch.float64, requires_grad=True), torch.randint(3, (n,))
    hidden = [torch.randn(n, d, dtype=torch.float64, requires_grad=True)]
    for t in range(T):
        a = scale * PLAIN[phi](hidden[-1]) @ weight[t].t() + bias[t]
        hidden.append(skip * hidden[-1] + PLAIN[f](a))
    cost = torch.nn.functional.cross_entropy(hidden[-1] @ head.t(), labels, reduction="sum")
    of_weight, of_bias, *adjoint = torch.autograd.grad(cost, (weight, bias, *hidden[1:]))

    z = torch.stack(hidden).detach().requires_grad_()
    energies = lgd.decoupled_linear_loss(
        z[:-1],
        weight,
        bias,
        z[1:],
        multiplier=-torch.stack(adjoint),
        activation=activation,
        preactivation=preactivation,
        skip=skip,
        branch_scale=scale,
        rho=0.7,
    )
    energy = energies.sum() + torch.nn.functional.cross_entropy(z[-1] @ head.t(), labels, reduction="sum")
    of_z, *of_parameters = torch.autograd.grad(energy, (z, weight, bias))
    assert of_z[1:].abs().max() < 1e-12  # z_0 is given
    torch.testing.assert_close(of_parameters, [of_weight, of_bias])


def test_equilibrium_of_a_linear_net(backend):
    """For rho = 1: S = I + sum of the products of the later weights with their transposes, q_T = S^-1 (z_T - the
    feed-forward output), q_t = W_t^T q_(t+1), and the energy is half of the square of S^(-1/2) times that error."""
    T, n, d = 4, 5, 6
    weight = (torch.randn(T, d, d, dtype=torch.float64) * 0.4).requires_grad_()
    first, last = torch.randn(2, n, d, dtype=torch.float64)
    with torch.no_grad():
        spread, later = torch.eye(d, dtype=torch.float64), torch.eye(d, dtype=torch.float64)
        for t in reversed(range(1, T)):
            later = later @ weight[t]
            spread = spread + later @ later.t()
        error = last - first @ (later @ weight[0]).t()
        q = [torch.linalg.solve(spread, error.t()).t()]
        for t in reversed(range(1, T)):
            q.insert(0, q[0] @ weight[t])
        hidden = [first]
        for t in range(T):
            hidden.append(hidden[-1] @ weight[t].t() + q[t])
    torch.testing.assert_close(hidden[-1], last)
    z = torch.stack(hidden).requires_grad_()
    energies = lgd.decoupled_linear_loss(z[:-1], weight, None, z[1:], activation="identity")
    of_z, of_weight = torch.autograd.grad(energies.sum(), (z, weight))
    assert of_z[1:-1].abs().max() < 1e-12
    torch.testing.assert_close(of_z[-1], q[-1])
    torch.testing.assert_close(energies.sum(), (error * q[-1]).sum() / 2)
    torch.testing.assert_close(of_weight, -torch.stack(q).transpose(1, 2) @ z.detach()[:-1])


def test_a_step_down_the_gradient_lowers_the_energy(backend):
    z, weight, bias, target, multiplier = make(3, 8, 6, 6)
    named = {"multiplier": multiplier, "activation": "gelu", "preactivation": True, "skip": 1.0, "branch_scale": 0.3}
    energy = lgd.decoupled_linear_loss(z, weight, bias, target, **named).sum()
    of_z, of_weight = torch.autograd.grad(energy, (z, weight))
    step, squared = 1e-4, (of_z**2).sum() + (of_weight**2).sum()
    after = lgd.decoupled_linear_loss(z - step * of_z, weight - step * of_weight, bias, target, **named).sum()
    assert float((energy - after).detach() / (step * squared)) == pytest.approx(1, abs=0.05)


# ---------------------------------------------------------------------------------------------------------------------
# Derivatives against finite differences, and torch's transforms
# ---------------------------------------------------------------------------------------------------------------------


@by_hidden_loss
@by_preactivation
@by_activation
def test_gradcheck_and_gradgradcheck(activation, preactivation, hidden_loss):
    named = {"activation": activation, "preactivation": preactivation, "hidden_loss": hidden_loss}

    def energies(*tensors):
        return loss(*tensors, **named, kappa=0.7, rho=0.6, skip=0.5, branch_scale=0.8)

    tensors = make(1, 2, 2, 2)
    assert gradcheck(energies, tensors, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(energies, tensors, check_fwd_over_rev=True, fast_mode=True)


@by_preactivation
def test_gradcheck_and_gradgradcheck_of_several_layers(preactivation):
    named = {"activation": ["gelu", "tanh"], "rho": [0.5, 2.0], "branch_scale": [1.0, 0.3], "hidden_loss": "huber"}

    def energies(*tensors):
        return loss(*tensors, **named, preactivation=preactivation, kappa=0.7)

    tensors = make(2, 2, 3, 2)
    assert gradcheck(energies, tensors, check_forward_ad=True)
    assert gradgradcheck(energies, tensors, check_fwd_over_rev=True)


def test_third_derivatives():
    def third(energies, x):
        derivative = energies.sum()
        for _ in range(3):
            (derivative,) = torch.autograd.grad(derivative.sum(), x, create_graph=True)
        return derivative

    tensors = make(2, 3, 2, 2)
    named = {"activation": "tanh", "skip": 1.0}
    expected = plain_layers(plain_linear, tensors, for_every_layer(2, **named))
    torch.testing.assert_close(third(loss(*tensors, **named), tensors[0]), third(expected, tensors[0]))


@by_preactivation
def test_transforms(preactivation):
    tensors = [x.detach() for x in make(2, 3, 4, 4)]
    named = {"activation": ["tanh", "silu"], "skip": [0.5, 1.0], "hidden_loss": "huber", "preactivation": preactivation}
    per_layer = for_every_layer(2, **named)

    def ours(*x):
        return loss(*x, **named).sum()

    def plain(*x):
        return plain_layers(plain_linear, x, per_layer).sum()

    every, close = (0, 1, 2, 3, 4), torch.testing.assert_close
    close(torch.func.grad(ours, every)(*tensors), torch.func.grad(plain, every)(*tensors))
    hessian = torch.func.hessian(plain, (0, 1))(*tensors)
    close(torch.func.hessian(ours, (0, 1))(*tensors), hessian)
    close(torch.func.jacrev(torch.func.jacrev(ours, (0, 1)), (0, 1))(*tensors), hessian)
    batch = [torch.stack([x, 2 * x, -x], dim=1) for x in tensors]
    for dims in ((1, 1, 1, 1, 1), (1, None, None, 1, None)):
        given = [b if dim == 1 else x for b, x, dim in zip(batch, tensors, dims, strict=True)]
        close(torch.vmap(ours, dims)(*given), torch.vmap(plain, dims)(*given))
        got = torch.vmap(torch.func.grad(ours, every), dims)(*given)
        close(got, torch.vmap(torch.func.grad(plain, every), dims)(*given))
    along = (tuple(batch), tuple(batch))
    got = torch.func.jvp(torch.vmap(torch.func.grad(ours), 1), *along)[1]
    close(got, torch.func.jvp(torch.vmap(torch.func.grad(plain), 1), *along)[1])


@by_preactivation
def test_gradcheck_and_gradgradcheck_of_lists(preactivation):
    lists = make_lists()
    given = given_of(lists)

    def energies(*tensors):
        tensors = iter(tensors)
        filled = [[None if x is None else next(tensors) for x in of] for of in lists]
        return loss(*filled, activation=["gelu", "tanh", "silu"], skip=[0.0, 0.5, 0.0], preactivation=preactivation)

    assert gradcheck(energies, given, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(energies, given, check_fwd_over_rev=True, fast_mode=True)


@by_preactivation
def test_transforms_of_lists(preactivation):
    lists = make_lists()
    tensors = [x.detach() for x in given_of(lists)]
    named = {"activation": ["gelu", "tanh", "silu"], "skip": [0.0, 0.5, 0.0], "preactivation": preactivation}
    per_layer = for_every_layer(3, **named)

    def filled(tensors):
        tensors = iter(tensors)
        return [[None if x is None else next(tensors) for x in of] for of in lists]

    def ours(*tensors):
        return loss(*filled(tensors), **named)

    def plain(*tensors):
        layers = zip(*filled(tensors), strict=True)
        return torch.stack([plain_linear(*x, **o) for x, o in zip(layers, per_layer, strict=True)])

    every, close = tuple(range(len(tensors))), torch.testing.assert_close
    batch = [torch.stack([x, 2 * x, -x], dim=1) for x in tensors]
    for dims in ((1,) * len(tensors), (None, 1) * (len(tensors) // 2) + (1,) * (len(tensors) % 2)):
        given = [b if dim == 1 else x for b, x, dim in zip(batch, tensors, dims, strict=True)]
        close(torch.vmap(ours, dims)(*given), torch.vmap(plain, dims)(*given))
        got, expected = (torch.func.grad(lambda *x, f=f: (f(*x) ** 2).sum(), every) for f in (ours, plain))
        close(torch.vmap(got, dims)(*given), torch.vmap(expected, dims)(*given))
    nested = [torch.stack([x, -x]) for x in batch]
    inner = (1,) * len(tensors)
    close(torch.vmap(torch.vmap(ours, inner))(*nested), torch.vmap(torch.vmap(plain, inner))(*nested))
    close(torch.func.hessian(ours, 1)(*tensors), torch.func.hessian(plain, 1)(*tensors))
    along = (tuple(tensors), tuple(torch.randn_like(x) for x in tensors))
    close(torch.func.jvp(ours, *along), torch.func.jvp(plain, *along))


def test_gradients_of_every_sample():
    """vmap over the samples gives each sample's share of the gradient of the weights."""
    z, weight, bias, target, multiplier = (x.detach() for x in make(2, 5, 3, 4))

    def of_one(z, target, multiplier):
        def energy(w):
            return lgd.decoupled_linear_loss(z[:, None], w, bias, target[:, None], multiplier=multiplier[:, None]).sum()

        return torch.func.grad(energy)(weight)

    of_samples = torch.vmap(of_one, in_dims=1)(z, target, multiplier)
    total = torch.func.grad(lambda w: lgd.decoupled_linear_loss(z, w, bias, target, multiplier=multiplier).sum())
    torch.testing.assert_close(of_samples.sum(0), total(weight))


def lists_of_stacks(dtype):
    """A stack of two layers, and one layer of another shape, in the order of NAMES."""
    stacks, layer = make(2, 3, 4, 4, dtype), make(1, 2, 5, 3, dtype)
    return [[x.detach(), y.detach()[0]] for x, y in zip(stacks, layer, strict=True)]


@pytest.mark.parametrize("given", ["everything", "nothing"])
@by_dtype
def test_opcheck(dtype, given):
    lists = lists_of_stacks(dtype)
    z, weight, _, delta, q = lists
    upstream = torch.ones(3, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    wants = [given == "everything"] * 2
    if given == "nothing":
        lists[2] = lists[4] = [None, None]
        upstream = None
    numbers = ([2, 6, 1], wants[0], 1, 0.7, [1.0, 0.5, 2.0], [1.0, 0.0, 0.0], [1.0, 0.3, 0.1])
    torch.library.opcheck(ops.decoupled_linear, (*lists, *numbers, [0.0, 0.5, 0.0], wants, wants))
    backward = ([2, 6, 1], wants[0], [1.0, 0.0, 0.0], [1.0, 0.3, 0.1], *[wants] * 5)
    torch.library.opcheck(ops.decoupled_linear_backward, (z, weight, q, delta, q, upstream, *backward))


def test_opcheck_where_the_stacks_differ_in_what_is_given_and_wanted():
    lists = lists_of_stacks(torch.float32)
    lists[2][0] = lists[4][1] = None
    numbers = ([2, 6, 1], True, 1, 0.7, [1.0, 0.5, 2.0], [1.0, 0.0, 0.0], [1.0, 0.3, 0.1], [0.0, 0.5, 0.0])
    torch.library.opcheck(ops.decoupled_linear, (*lists, *numbers, [False, True], [True, False]))
    z, weight, _, delta, q = lists_of_stacks(torch.float32)
    e = [q[0].new_empty(0), torch.randn_like(q[1])]
    needs = ([True, False], [False, True], [True, True], [False, True], [False, True])
    backward = ([2, 6, 1], True, [1.0, 0.0, 0.0], [1.0, 0.3, 0.1], *needs)
    torch.library.opcheck(ops.decoupled_linear_backward, (z, weight, e, delta, q, torch.ones(3), *backward))


def test_opcheck_with_weights_in_a_narrower_dtype():
    tensors = [x.detach() for x in make(2, 3, 4, 5, torch.float32)]
    tensors[1], tensors[2] = tensors[1].bfloat16(), tensors[2].bfloat16()
    lists = [[x] for x in tensors]
    options = ([2, 6], True, 0, 1.0, [1.0, 0.5], [0.0, 0.0], [1.0, 0.3], [0.0, 0.5], [True], [True])
    torch.library.opcheck(ops.decoupled_linear, (*lists, *options))
    _, *made = ops.decoupled_linear(*lists, *options)
    options = ([2, 6], True, [0.0, 0.0], [1.0, 0.3], *[[True]] * 5)
    torch.library.opcheck(ops.decoupled_linear_backward, (*lists[:2], *made, None, *options))


def test_the_gradient_of_a_narrower_bias_sums_what_is_not_rounded(backend):
    """Products take delta rounded to the weights' dtype; its sum over 300 samples is rounded once, at the end."""
    z, weight, _, delta, q = (torch.rand(2, 300, 4), torch.rand(2, 5, 4).bfloat16(), None, *torch.rand(2, 2, 300, 5))
    upstream = torch.tensor([1.0, -0.5])
    options = ([0, 0], False, [0.0, 0.0], [1.0, 1.0], False, False, True, False, False)
    _, _, grad_bias, _, _ = backward_op(z, weight, q, delta, q, upstream, *options)
    exact = delta.double().sum(1) * upstream.double()[:, None]
    assert torch.equal(grad_bias, exact.bfloat16())


# Odd widths, for which no product runs in bfloat16; partial tiles; sums longer than a piece, of odd numbers of samples.
BFLOAT16_SIZES = [
    (2, 1, 2, 2),
    (2, 7, 5, 3),
    (3, 33, 66, 18),
    (1, 66, 130, 4),
    (1, 301, 40, 70),
    (2, 3, 6, 1030),
    (1, 4, 1030, 6),
]


def worst_of_product(got, a, b, scale):
    """The largest error of got = scale * a @ b, relative to the float32 errors that such sums may have."""
    a, b = a.double(), b.double()
    rounding = torch.finfo(got.dtype).eps * (a @ b).abs() + torch.finfo(torch.float32).eps * a.shape[-1] ** 0.5 * (
        a.abs() @ b.abs()
    )
    return float(((got.double() / scale - a @ b).abs() / rounding.clamp_min(1e-30)).max())


@pytest.mark.parametrize("sizes", BFLOAT16_SIZES, ids=str)
@pytest.mark.parametrize("library", [True, False], ids=["with oneDNN", "without"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_products_of_bfloat16(backend, dtype, library, sizes):
    """All three of them, for weights in bfloat16: exact but for the sums in float32."""
    T, n, d_in, d_out = sizes
    z, target, delta = torch.randn(T, n, d_in), torch.randn(T, n, d_out), torch.randn(T, n, d_out)
    z, target, delta = z.to(dtype), target.to(dtype), delta.to(dtype)
    weight = torch.randn(T, d_out, d_in).bfloat16()
    operand, rounded = z.bfloat16(), delta.bfloat16()
    per_layer = ([0.0] * T, [0.5] * T)  # skip, branch_scale
    with torch.backends.mkldnn.flags(enabled=library):
        options = ([0] * T, False, 0, 1.0, [1.0] * T, *per_layer, [0.0] * T, True, False)
        _, e, _, _ = forward_op(z, weight, None, torch.zeros_like(target), None, *options)
        given = (z, weight, e, delta, target, None, [0] * T, False, *per_layer)
        grad_z, grad_weight, grad_bias, _, _ = backward_op(*given, True, True, True, False, False)
    assert worst_of_product(e, operand, weight.mT, -0.5) < 1
    assert worst_of_product(grad_z, rounded, weight, 0.5) < 1
    assert worst_of_product(grad_weight, rounded.mT, operand, 0.5) < 1
    assert worst_of_product(grad_bias.unsqueeze(2), delta.mT, torch.ones(T, n, 1), 1.0) < 1


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    named = {"skip": 1.0, "activation": ["relu", "gelu"], "preactivation": True}
    compiled = torch.compile(functools.partial(loss, **named), fullgraph=True)
    for n in (3, 5) if dynamic else (3,):
        tensors = make(2, n, 4, 4, torch.float32)
        expected, energies = loss(*tensors, **named), compiled(*tensors)
        torch.testing.assert_close(energies, expected)
        wanted = torch.autograd.grad(expected.sum(), tensors)
        torch.testing.assert_close(torch.autograd.grad(energies.sum(), tensors), wanted)


def test_compile_of_a_list_without_gradients():
    lists = [[x if x is None else x.detach() for x in tensors] for tensors in make_lists(torch.float32)]
    torch.testing.assert_close(torch.compile(loss, fullgraph=True)(*lists), loss(*lists))


def test_compile_lists():
    lists = make_lists(torch.float32)
    given = given_of(lists)
    energies = torch.compile(loss, fullgraph=True)(*lists)
    expected = torch.autograd.grad(loss(*lists).sum(), given)
    torch.testing.assert_close(torch.autograd.grad(energies.sum(), given), expected)


@by_preactivation
def test_autocast(preactivation):
    """The operands of the products are bfloat16, and all else is float32."""
    tensors = make(2, 3, 4, 4, torch.float32)
    named = {"skip": 1.0, "activation": "tanh", "preactivation": preactivation}
    with torch.autocast(DEVICE.type, torch.bfloat16):
        energies = loss(*tensors, **named)
    grads = torch.autograd.grad(energies.sum(), tensors)
    assert energies.dtype == torch.float32 and all(grad.dtype == torch.float32 for grad in grads)

    z, weight, bias, target, multiplier = tensors
    options = ([2, 2], preactivation, 0, 1.0, [1.0, 1.0], [1.0, 1.0], [1.0, 1.0], [0.0, 0.0], True, True)
    with torch.no_grad():
        narrow = forward_op(z, weight.bfloat16(), bias.bfloat16(), target, multiplier, *options)
        rounded = (torch.tanh(z) if preactivation else z).bfloat16().float() @ weight.bfloat16().float().mT
        a = rounded + bias.bfloat16().float()[:, None]
        prediction = z + (a if preactivation else torch.tanh(a))
    assert torch.equal(energies, narrow[0])
    torch.testing.assert_close(narrow[1], target - prediction)
    for grad, exact in zip(grads, torch.autograd.grad(loss(*tensors, **named).sum(), tensors), strict=True):
        assert 0 < (grad - exact).abs().max() < 0.03 * exact.abs().max()


def test_autocast_of_lists():
    """As of the stack."""
    tensors = make(3, 5, 6, 6, torch.float32)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        of_stack, of_list = loss(*tensors), loss(*(list(x) for x in tensors))
    assert torch.equal(of_stack, of_list) and not torch.equal(of_list, loss(*tensors))
    grads = torch.autograd.grad(of_list.sum(), tensors)
    torch.testing.assert_close(grads, torch.autograd.grad(of_stack.sum(), tensors))


def test_autocast_leaves_float64_alone():
    tensors = make(2, 3, 4, 4)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        energies = loss(*tensors)
    assert torch.equal(energies, loss(*tensors)) and energies.dtype == torch.float64


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------

Z, W, B, TARGET = torch.zeros(2, 3, 4), torch.zeros(2, 5, 4), torch.zeros(2, 5), torch.zeros(2, 3, 5)
FITS = r"for z of shape \(2, 3, 4\) and weight of shape \(2, 5, 4\)"


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"z": None}, TypeError, r"z: expected a torch.Tensor or a list of them, got NoneType"),
        ({"z": Z.int()}, TypeError, r"z: dtype must be float64, .* got torch.int32"),
        ({"z": Z[0]}, ValueError, r"z: expected 3 dimensions, got 2 \(shape \(3, 4\)\)"),
        ({"weight": W[0]}, ValueError, r"weight: expected 3 dimensions, got 2 \(shape \(5, 4\)\)"),
        ({"weight": W.mT}, ValueError, r"weight: expected shape \(2, 4, 4\) for z of .*\(2, 3, 4\), got \(2, 4, 5\)"),
        ({"weight": W[:1]}, ValueError, r"weight: expected shape \(2, 5, 4\) for z .*\(2, 3, 4\), got \(1, 5, 4\)"),
        ({"weight": [W[0], W[1]]}, TypeError, r"weight: expected a torch.Tensor, got list"),
        ({"weight": W.half()}, TypeError, r"weight: has dtype torch.float16, but z has dtype torch.float32"),
        ({"bias": B[0]}, ValueError, r"bias: expected 2 dimensions, got 1 \(shape \(5,\)\)"),
        ({"bias": B[:, :4]}, ValueError, r"bias: expected shape \(2, 5\) for weight .*\(2, 5, 4\), got \(2, 4\)"),
        ({"bias": 0.0}, TypeError, r"bias: expected a torch.Tensor, got float"),
        ({"target": Z}, ValueError, rf"target: expected shape \(2, 3, 5\) {FITS}, got \(2, 3, 4\)"),
        ({"target": TARGET.double()}, TypeError, r"target: has dtype torch.float64, but z has dtype torch.float32"),
        ({"target": TARGET.to("meta")}, ValueError, rf"target: is on meta, but z is on {DEVICE}"),
        ({"multiplier": Z}, ValueError, rf"multiplier: expected shape \(2, 3, 5\) {FITS}, got \(2, 3, 4\)"),
        ({"multiplier": 0.0}, TypeError, r"multiplier: expected a torch.Tensor, got float"),
        ({"skip": 1.0}, ValueError, r"skip: is 1.0 for layer 0, which needs d_in == d_out, got 4 and 5"),
        ({"skip": [0.0, 0.5]}, ValueError, r"skip: is 0.5 for layer 1, which needs d_in == d_out, got 4 and 5"),
        ({"skip": [0.0]}, ValueError, r"skip: has 1 values, but there are 2 layers"),
        ({"branch_scale": [1.0] * 3}, ValueError, r"branch_scale: has 3 values, but there are 2 layers"),
        ({"branch_scale": B}, TypeError, r"branch_scale: expected a number, or a list .* got Tensor"),
        ({"branch_scale": float("inf")}, ValueError, r"branch_scale: must be finite, got inf"),
        ({"rho": -0.5}, ValueError, r"rho: must not be negative, got -0.5"),
        ({"kappa": -1.0}, ValueError, r"kappa: must be positive, got -1.0"),
        ({"activation": "swish"}, ValueError, r"activation: unknown value 'swish'; choose one of 'identity', 'relu'"),
        ({"activation": ["relu"]}, ValueError, r"activation: has 1 values, but there are 2 layers"),
        ({"hidden_loss": "mse"}, ValueError, r"hidden_loss: unknown value 'mse'; choose one of 'squared', 'huber'"),
    ],
)
def test_bad_input(changed, error, message):
    with pytest.raises(error, match=message):
        lgd.decoupled_linear_loss(**{"z": Z, "weight": W, "bias": B, "target": TARGET} | changed)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"z": []}, ValueError, r"z: expected at least 1 layer, got an empty list"),
        ({"z": [Z[0], None]}, TypeError, r"z\[1\]: expected a torch.Tensor, got NoneType"),
        ({"weight": W}, TypeError, r"weight: expected a list of tensors because z is one, got Tensor"),
        ({"weight": [W[0]]}, ValueError, r"weight: has 1 layers, but z has 2"),
        ({"weight": [W[0], W]}, ValueError, r"weight\[1\]: expected 2 dimensions, got 3 \(shape \(2, 5, 4\)\)"),
        ({"bias": [B[0], B[1, :2]]}, ValueError, r"bias\[1\]: expected shape \(5,\) .* got \(2,\)"),
        ({"target": [TARGET[0], Z[1]]}, ValueError, r"target\[1\]: expected shape \(3, 5\) .* got \(3, 4\)"),
        ({"multiplier": TARGET}, TypeError, r"multiplier: expected a list of tensors because z is one, got Tensor"),
        ({"skip": [0.0, 1.0]}, ValueError, r"skip: is 1.0 for layer 1, which needs d_in == d_out, got 4 and 5"),
        ({"rho": [1.0]}, ValueError, r"rho: has 1 values, but there are 2 layers"),
    ],
)
def test_bad_input_in_lists(changed, error, message):
    lists = {"z": list(Z), "weight": list(W), "bias": list(B), "target": list(TARGET)}
    with pytest.raises(error, match=message):
        lgd.decoupled_linear_loss(**lists | changed)


def test_lists_of_different_dtypes():
    lists = [list(x) for x in (Z, W, B, TARGET)]
    for tensors in lists:
        tensors[1] = tensors[1].double()
    with pytest.raises(TypeError, match=r"z\[1\]: has dtype torch.float64, but z\[0\] has dtype torch.float32"):
        lgd.decoupled_linear_loss(*lists)


@pytest.mark.cpu
def test_the_compiled_ops_refuse_what_would_be_read_beyond_its_end(compiled):
    """A skip where widths differ: the wrappers refuse it before, but ops can be called by anyone."""
    z, weight, target = torch.zeros(2, 3, 4), torch.zeros(2, 5, 4), torch.zeros(2, 3, 5)
    per_layer = ([0.0, 0.5], [1.0, 1.0])
    with pytest.raises(ValueError, match=r"skip: is 0.5 for layer 1, which needs d_in == d_out, got 4 and 5"):
        forward_op(z, weight, None, target, None, [0, 0], False, 0, 1.0, [1.0] * 2, *per_layer, [0.0] * 2, True, True)
    with pytest.raises(ValueError, match=r"skip: is 0.5 for layer 1, which needs d_in == d_out, got 4 and 5"):
        backward_op(z, weight, target, target, target, None, [0, 0], False, *per_layer, *[True] * 5)
