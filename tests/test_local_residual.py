"""local_residual, every backend, against the equations in extended precision (layer_oracle.py)."""

from __future__ import annotations

import functools

import pytest
import torch
from cases import DTYPES, dtype_name
from conftest import CPU_BACKENDS
from layer_oracle import (
    ACTIVATIONS,
    HIDDEN_LOSSES,
    assert_layers,
    exact_layers,
    exact_residual,
    plain_layers,
    plain_residual,
)
from torch.autograd import gradcheck, gradgradcheck

import lgd_kernels as lgd
from lgd_kernels import backends, ops, reference

SERVED_BY = [name for name in CPU_BACKENDS if name != "cpp" or backends.has_kernel("local_residual", "cpu")]
NAMES = ("logits", "target", "multiplier", "skip_input")
NAN = float("nan")
by_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
by_hidden_loss = pytest.mark.parametrize("hidden_loss", HIDDEN_LOSSES)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)


@pytest.fixture(params=SERVED_BY)
def backend(request, nan_prefill):
    with backends.force(request.param):
        yield


def make(T, n, d, dtype=torch.float64, multiplier=True, skip_input=True):
    """The tensors in the order of NAMES, all of them requiring grad."""
    tensors = [(torch.randn(T, n, d, dtype=torch.float64) * 1.5).to(dtype).requires_grad_() for _ in NAMES]
    return [x if wanted else None for x, wanted in zip(tensors, (True, True, multiplier, skip_input), strict=True)]


def loss(logits, target, multiplier, skip_input, **options):
    return lgd.local_residual_loss(logits, target, multiplier=multiplier, skip_input=skip_input, **options)


def for_every_layer(T, **options):
    """Options of the loss, as the oracle wants them: one dictionary for each layer."""
    defaults = {"activation": "tanh", "hidden_loss": "squared", "kappa": 1.0, "rho": 1.0, "skip": 0.0}
    lists = {name: value if isinstance(value, list) else [value] * T for name, value in (defaults | options).items()}
    return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]


def check(tensors, **options):
    """Energies, and all gradients for an upstream gradient of its own for every layer."""
    T, dtype = len(tensors[0]), tensors[0].dtype
    energies, per_layer = loss(*tensors, **options), for_every_layer(T, **options)
    exact, plain = exact_layers(exact_residual, tensors, per_layer), plain_layers(plain_residual, tensors, per_layer)
    assert energies.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_layers(energies, exact["energy"], plain, dtype, "energy")

    given = [x for x in tensors if x is not None]
    upstream = torch.linspace(-1, 2, T, dtype=energies.dtype)
    grads = torch.autograd.grad(energies, given, upstream)
    plain = torch.autograd.grad(plain, given, upstream, materialize_grads=True)
    names = [name for name, x in zip(NAMES, tensors, strict=True) if x is not None]
    for name, grad, of_plain in zip(names, grads, plain, strict=True):
        assert grad.dtype == dtype
        expected = upstream.numpy()[:, None, None] * exact[name]
        assert_layers(grad, expected, of_plain, dtype, f"gradient of {name}")


# ---------------------------------------------------------------------------------------------------------------------
# Values and first derivatives
# ---------------------------------------------------------------------------------------------------------------------


@by_dtype
@by_hidden_loss
@by_activation
def test_energies_and_gradients(backend, activation, hidden_loss, dtype):
    check(make(3, 5, 7, dtype), activation=activation, hidden_loss=hidden_loss, kappa=0.7, rho=0.8, skip=1.0)


@pytest.mark.parametrize("multiplier", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 9), (4, 33, 65), (2, 300, 16)])
def test_options_of_their_own_for_every_layer(backend, shape, multiplier):
    T = shape[0]
    check(
        make(*shape, torch.float32, multiplier),
        activation=list(ACTIVATIONS[-T:]),
        rho=[0.5 + t for t in range(T)],
        skip=[0.25 * t for t in range(T)],
        hidden_loss="huber",
        kappa=0.3,
    )


def test_without_skip_input(backend):
    check(make(2, 4, 3, multiplier=False, skip_input=False), activation="silu")


@by_dtype
def test_outputs_on_request_and_the_step_of_the_multiplier(backend, dtype):
    tensors = [x.detach() for x in make(3, 6, 5, dtype)]
    options = {"activation": ["gelu", "relu", "identity"], "hidden_loss": "huber", "kappa": 0.5, "rho": [1.0, 2.0, 0.0]}
    per_layer = for_every_layer(3, **options, skip=[0.0, 1.0, 0.5])
    dual_step = [0.0, 0.5, 1.5]
    exact = exact_layers(
        exact_residual, tensors, [o | {"dual_step": s} for o, s in zip(per_layer, dual_step, strict=True)]
    )
    codes = [reference.ACTIVATIONS.index(name) for name in options["activation"]]
    call = functools.partial(ops.local_residual, *tensors, codes, 1, 0.5, options["rho"], [0.0, 1.0, 0.5], dual_step)
    energy, *made = call(True, True)
    accumulated = energy.dtype
    assert_layers(energy, exact["energy"], torch.as_tensor(exact["energy"].astype(float)), accumulated, "energy")
    for name, got in zip(("e", "delta", "q"), made, strict=True):
        assert_layers(got, exact[name], torch.as_tensor(exact[name].astype(float)).to(accumulated), dtype, name)
    for need_residual, need_gradient in ((False, False), (True, False), (False, True)):
        again = call(need_residual, need_gradient)
        wanted = (True, need_residual, need_gradient, need_gradient)
        for got, full, want in zip(again, (energy, *made), wanted, strict=True):
            assert torch.equal(got, full if want else full.new_empty(0))


def test_one_layer_without_the_first_dimension(backend):
    tensors = make(1, 4, 3)
    stacked = loss(*tensors, skip=0.5, activation="relu")
    alone = loss(*(x[0] for x in tensors), skip=0.5, activation="relu")
    assert alone.shape == () and torch.equal(alone, stacked[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_name)
@by_activation
def test_a_stack_of_layers_equals_its_layers_bit_for_bit(backend, activation, dtype):
    tensors = make(3, 5, 7, dtype)  # 35 elements: the layers start at every alignment
    energies = loss(*tensors, activation=activation, skip=1.0)
    grads = torch.autograd.grad(energies.sum(), tensors)
    for t in range(3):
        layer = [x[t : t + 1].detach().clone().requires_grad_() for x in tensors]
        energy = loss(*layer, activation=activation, skip=1.0)
        assert torch.equal(energy, energies[t : t + 1])
        for grad, of_stack in zip(torch.autograd.grad(energy.sum(), layer), grads, strict=True):
            assert torch.equal(grad[0], of_stack[t])


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_size_zero(backend, shape):
    tensors = make(*shape)
    energies = loss(*tensors, skip=1.0)
    assert torch.equal(energies, torch.zeros(shape[0], dtype=torch.float64))
    for grad in torch.autograd.grad(energies.sum(), tensors):
        assert grad.shape == shape


def test_strides(backend):
    dense = [x.detach() for x in make(3, 6, 8, torch.float32)]
    expected = loss(*dense, skip=1.0)
    strided = [
        dense[0].transpose(0, 2).contiguous().transpose(0, 2),
        dense[1].repeat_interleave(2, dim=1)[:, ::2],
        dense[2][:1].expand(3, 6, 8),
        dense[3].transpose(1, 2).contiguous().transpose(1, 2),
    ]
    dense[2] = strided[2].contiguous()
    expected = loss(*dense, skip=1.0)
    torch.testing.assert_close(loss(*strided, skip=1.0), expected)
    strided = [x.requires_grad_() for x in strided]
    dense = [x.requires_grad_() for x in dense]
    expected = torch.autograd.grad(loss(*dense, skip=1.0).sum(), dense)
    for grad, wanted in zip(torch.autograd.grad(loss(*strided, skip=1.0).sum(), strided), expected, strict=True):
        torch.testing.assert_close(grad, wanted)


@by_activation
def test_nan_goes_through(backend, activation):
    """A NaN in one element shows in its energy and in its gradients, and nowhere else."""
    tensors = make(2, 3, 4)
    with torch.no_grad():
        tensors[0][0, 1, 2] = NAN
    energies = loss(*tensors, activation=activation, hidden_loss="huber", skip=1.0)
    assert energies.isnan().tolist() == [True, False]
    expected = torch.zeros(2, 3, 4, dtype=torch.bool)
    expected[0, 1, 2] = True
    for grad in torch.autograd.grad(energies.sum(), tensors):
        assert torch.equal(grad.isnan(), expected)


@by_activation
def test_derivative_of_nan_is_nan(activation):
    x = torch.tensor([NAN, 1.0], dtype=torch.float64)
    code = reference.ACTIVATIONS.index(activation)
    slope = reference.activations.activation_derivative(code, x)
    assert slope.isnan().tolist() == [activation != "identity", False]


def test_kinks():
    zero = torch.zeros(1, 1, 1, dtype=torch.float64, requires_grad=True)
    for activation, slope in (("relu", 0.0), ("leaky_relu", 0.01)):
        energy = lgd.local_residual_loss(zero, torch.ones_like(zero), activation=activation)
        assert torch.autograd.grad(energy.sum(), zero)[0].item() == -slope


@pytest.mark.parametrize(("hidden_loss", "of_large"), [("squared", 5e19), ("huber", 1e10)])
def test_large_and_infinite_residuals(backend, hidden_loss, of_large):
    """Squared grows quadratically, Huber linearly, and infinity stays infinity."""
    target = torch.tensor([1e10, -1e10, float("inf"), -float("inf")]).view(4, 1, 1)
    energies = lgd.local_residual_loss(torch.zeros(4, 1, 1), target, hidden_loss=hidden_loss)
    assert energies.tolist() == [pytest.approx(of_large)] * 2 + [float("inf")] * 2


def test_inputs_are_not_modified(backend):
    tensors = make(2, 3, 4)
    before = [x.detach().clone() for x in tensors]
    torch.autograd.grad(loss(*tensors, skip=1.0).sum(), tensors)
    assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True))


def test_a_gradient_that_is_not_needed_is_not_made(backend):
    tensors = [x.detach() for x in make(2, 3, 4)]
    tensors[1].requires_grad_()
    energies = loss(*tensors, skip=1.0)
    energies.sum().backward()
    assert [x.grad is not None for x in tensors] == [False, True, False, False]


# ---------------------------------------------------------------------------------------------------------------------
# Derivatives against finite differences, and torch's transforms
# ---------------------------------------------------------------------------------------------------------------------


def small(T=1, n=2, d=2):
    """Tensors away from the kinks of relu, leaky_relu and huber with kappa 0.7."""
    tensors = make(T, n, d)
    with torch.no_grad():
        tensors[0] += 0.2 * tensors[0].sign()
    return tensors


@by_hidden_loss
@by_activation
def test_gradcheck_and_gradgradcheck(activation, hidden_loss):
    def energies(*tensors):
        return loss(*tensors, activation=activation, hidden_loss=hidden_loss, kappa=0.7, rho=0.6, skip=0.5)

    tensors = small()
    assert gradcheck(energies, tensors, check_forward_ad=True)
    assert gradgradcheck(energies, tensors, check_fwd_over_rev=True, fast_mode=True)


def test_gradgradcheck_of_several_layers():
    def energies(logits, target, multiplier, skip_input):
        options = {"activation": ["gelu", "tanh"], "rho": [0.5, 2.0], "skip": [1.0, 0.0], "hidden_loss": "huber"}
        return loss(logits, target, multiplier, skip_input, kappa=0.7, **options)

    assert gradgradcheck(energies, small(T=2), check_fwd_over_rev=True)


def test_third_derivatives():
    x = torch.tensor([[[0.3]]], dtype=torch.float64, requires_grad=True)
    target = torch.tensor([[[0.9]]], dtype=torch.float64)

    def derivatives(energy):
        derivative = energy
        for _ in range(3):
            (derivative,) = torch.autograd.grad(derivative.sum(), x, create_graph=True)
            yield derivative.item()

    ours = list(derivatives(lgd.local_residual_loss(x, target)))
    assert ours == pytest.approx(list(derivatives(0.5 * (target - torch.tanh(x)) ** 2)))


def test_transforms():
    tensors = [x.detach() for x in make(2, 3, 4)]
    options = {"activation": ["tanh", "silu"], "skip": [0.5, 1.0], "hidden_loss": "huber"}
    per_layer = for_every_layer(2, **options)

    def ours(*x):
        return loss(*x, **options).sum()

    def plain(*x):
        return plain_layers(plain_residual, x, per_layer).sum()

    every = (0, 1, 2, 3)
    torch.testing.assert_close(torch.func.grad(ours, every)(*tensors), torch.func.grad(plain, every)(*tensors))
    hessian = torch.func.hessian(plain)(*tensors)
    torch.testing.assert_close(torch.func.hessian(ours)(*tensors), hessian)
    torch.testing.assert_close(torch.func.jacrev(torch.func.jacrev(ours))(*tensors), hessian)
    batch = [torch.stack([x, 2 * x, -x], dim=1) for x in tensors]
    for dims in ((1, 1, 1, 1), (1, None, 1, None)):
        given = [b if dim == 1 else x for b, x, dim in zip(batch, tensors, dims, strict=True)]
        for function, of_plain in ((ours, plain), (torch.func.grad(ours, every), torch.func.grad(plain, every))):
            got, expected = torch.vmap(function, dims)(*given), torch.vmap(of_plain, dims)(*given)
            torch.testing.assert_close(got, expected)
    tangent = torch.func.jvp(torch.vmap(torch.func.grad(ours), 1), tuple(batch), tuple(batch))[1]
    torch.testing.assert_close(
        tangent, torch.func.jvp(torch.vmap(torch.func.grad(plain), 1), tuple(batch), tuple(batch))[1]
    )


@pytest.mark.parametrize("given", ["everything", "nothing"])
@by_dtype
def test_opcheck(dtype, given):
    tensors = [x.detach() for x in make(2, 3, 4, dtype)]
    if given == "nothing":
        tensors[2:] = [None, None]
    skip = [1.0, 0.5] if given == "everything" else [0.0, 0.0]
    for wanted in ((True, True), (False, False)):
        torch.library.opcheck(ops.local_residual, (*tensors, [2, 6], 1, 0.7, [1.0, 0.5], skip, [0.0, 0.5], *wanted))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    compiled = torch.compile(functools.partial(loss, skip=1.0, activation=["relu", "gelu"]), fullgraph=True)
    for n in (3, 5) if dynamic else (3,):
        tensors = make(2, n, 4, torch.float32)
        expected = loss(*tensors, skip=1.0, activation=["relu", "gelu"])
        energies = compiled(*tensors)
        torch.testing.assert_close(energies, expected)
        grads, wanted = torch.autograd.grad(energies.sum(), tensors), torch.autograd.grad(expected.sum(), tensors)
        torch.testing.assert_close(grads, wanted)


def test_autocast():
    """Logits in bfloat16 from a linear layer, with targets in float32."""
    tensors = make(2, 3, 4, torch.float32)
    mixed = [tensors[0].detach().bfloat16().requires_grad_(), *tensors[1:]]
    with torch.autocast("cpu", torch.bfloat16):
        energies = loss(*mixed, skip=1.0)
    full = loss(mixed[0].float(), *mixed[1:], skip=1.0)
    assert torch.equal(energies, full)
    grads, of_full = torch.autograd.grad(energies.sum(), mixed), torch.autograd.grad(full.sum(), mixed)
    assert [grad.dtype for grad in grads] == [torch.bfloat16] + [torch.float32] * 3
    assert all(torch.equal(grad, expected) for grad, expected in zip(grads, of_full, strict=True))
    double = make(2, 3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(*double, skip=1.0), loss(*double, skip=1.0)) and loss(*double).dtype == torch.float64


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------

X = torch.zeros(2, 3, 4)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"logits": [1.0]}, TypeError, r"logits: expected a torch.Tensor, got list"),
        ({"logits": X.long()}, TypeError, r"logits: dtype must be float64, .* got torch.int64"),
        ({"logits": X[0, 0]}, ValueError, r"logits: expected 2 or 3 dimensions, got 1 \(shape \(4,\)\)"),
        ({"target": None}, TypeError, r"target: expected a torch.Tensor, got NoneType"),
        ({"target": X[:1]}, ValueError, r"target: expected shape \(2, 3, 4\) as logits have it, got \(1, 3, 4\)"),
        ({"target": X.double()}, TypeError, r"target: has dtype torch.float64, but logits has dtype torch.float32"),
        ({"target": X.to("meta")}, ValueError, r"target: is on meta, but logits is on cpu"),
        ({"multiplier": X[..., :2]}, ValueError, r"multiplier: expected shape \(2, 3, 4\) .* got \(2, 3, 2\)"),
        ({"multiplier": 1.0}, TypeError, r"multiplier: expected a torch.Tensor, got float"),
        ({"skip_input": X.half()}, TypeError, r"skip_input: has dtype torch.float16, but logits has dtype .*float32"),
        ({"skip": 0.5}, ValueError, r"skip_input: is None, but skip is 0.5"),
        ({"skip": [1.0]}, ValueError, r"skip: has 1 values, but there are 2 layers"),
        ({"skip": "1"}, TypeError, r"skip: expected a number, or a list with one per layer, got str"),
        ({"skip": NAN}, ValueError, r"skip: must be finite, got nan"),
        ({"rho": -1.0}, ValueError, r"rho: must not be negative, got -1.0"),
        ({"rho": [1.0, 2.0, 3.0]}, ValueError, r"rho: has 3 values, but there are 2 layers"),
        ({"kappa": 0.0}, ValueError, r"kappa: must be positive, got 0.0"),
        ({"kappa": NAN}, ValueError, r"kappa: must be positive, got nan"),
        ({"activation": "Tanh"}, ValueError, r"activation: unknown value 'Tanh'; choose one of 'identity', 'relu', "),
        ({"activation": ["tanh"]}, ValueError, r"activation: has 1 values, but there are 2 layers"),
        ({"activation": ["tanh", "elu"]}, ValueError, r"activation: unknown value 'elu'; choose one of .*'leaky_relu'"),
        ({"hidden_loss": "l1"}, ValueError, r"hidden_loss: unknown value 'l1'; choose one of 'squared', 'huber'"),
    ],
)
def test_bad_input(changed, error, message):
    with pytest.raises(error, match=message):
        lgd.local_residual_loss(**{"logits": X, "target": X} | changed)
