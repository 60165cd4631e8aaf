"""decoupled_step_, every backend: against the equations in extended precision (step_oracle.py), torch.optim, and what
is known exactly about decoupled nets."""

from __future__ import annotations

import copy
import functools
import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import dtype_name
from device import DEVICE
from layer_oracle import ACTIVATIONS, HIDDEN_LOSSES, PLAIN
from oracle import array
from step_nets import (
    ALL,
    IN_PLACE,
    SERVED_BY,
    arguments_of_op,
    assert_same,
    clone,
    dense,
    gradients,
    layers_of,
    listed,
    make,
    parameters,
    same,
    step,
)
from step_oracle import (
    State,
    exact_judgement,
    mean_gradients,
    plain_judgement,
    spelled_out,
    step_of_parameters_,
    visit_,
)
from tolerance import accumulation_dtype, assert_accurate

import lgd_kernels as lgd
from lgd_kernels import backends, ops, reference

NAN = float("nan")
by_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
by_hidden_loss = pytest.mark.parametrize("hidden_loss", HIDDEN_LOSSES)
by_preactivation = pytest.mark.parametrize("preactivation", [False, True], ids=["post", "pre"])
by_head = pytest.mark.parametrize("head", ["softmax_infogain", "squared"])
by_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=dtype_name)
by_narrow_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_name)


@pytest.fixture(params=SERVED_BY)
def backend(request, nan_prefill):
    with backends.force(request.param):
        yield request.param


def test_make_makes_nets_that_the_op_takes(backend):
    tensors = make(stacked=False, velocity=True)
    energies = step(tensors)
    assert energies.shape == (3,) and energies.dtype == torch.float64 and energies.isfinite().all()


# ---------------------------------------------------------------------------------------------------------------------
# Every buffer after every visit, against the equations
# ---------------------------------------------------------------------------------------------------------------------

RULES = {
    "gradient": None,
    "sgd": functools.partial(torch.optim.SGD, weight_decay=0.1),
    "momentum": functools.partial(torch.optim.SGD, momentum=0.9, weight_decay=0.1),
    "adam": functools.partial(torch.optim.Adam, weight_decay=0.1),
    "adamw": functools.partial(torch.optim.AdamW, weight_decay=0.1),
}
BUFFERS = {"momentum": ("momentum_buffer",), "adam": ("exp_avg", "exp_avg_sq"), "adamw": ("exp_avg", "exp_avg_sq")}
LR, DECAY = 0.05, 0.1


def judged_visit(judge, state, options, rule, keep):
    """One visit of the oracle with its step of the parameters: everything that has changed, by name."""
    judged = visit_(judge, state, options, keep)
    mean = mean_gradients(judged, len(state.x))
    if rule != "gradient":
        step_of_parameters_(rule, state, mean, LR, DECAY)
    after = {name: list(getattr(state, name) or []) for name in IN_PLACE}
    for i, name in enumerate(BUFFERS.get(rule, ())):
        after |= {f"{name} of {p}": [pair[i] for pair in pairs] for p, pairs in state.buffers.items()}
    if rule == "gradient":
        after |= {f"gradient of {name}": mean[name] for name in ("weight", "bias") if getattr(state, name)}
    return after | {"energies": judged.energies, "residual": judged.e}


def op_visit(tensors, rule, optimizer, options):
    """The same of the op."""
    energies, residual = step(tensors, optimizer=optimizer, return_residual=True, **options)
    after = {name: listed(tensors[name]) for name in IN_PLACE}
    for name in BUFFERS.get(rule, ()):
        after |= {
            f"{name} of {p}": [optimizer.state[v][name] for v in tensors[p]] for p in ("weight", "bias") if tensors[p]
        }
    if rule == "gradient":
        after |= {f"gradient of {p}": [v.grad for v in tensors[p]] for p in ("weight", "bias") if tensors[p]}
    return after | {"energies": list(energies), "residual": layers_of(residual)}


def check(tensors, *, H=(None, None), rule="gradient", visits=1, **options):
    """Everything after every visit is what the equations say. H: (the Infogain, a dense matrix)."""
    options = {"step_size": 0.2} | options
    dtype, T = tensors["x"].dtype, len(tensors["weight"])
    spelled = spelled_out(T, len(tensors["weight"][-1]), H=H[1], operands=operands_of(dtype), **options)
    exact, plain = State(**tensors).exact(), State(**tensors).plain()
    optimizer = None if rule == "gradient" else RULES[rule](parameters(tensors), lr=LR)
    for visit in range(visits):
        expected = judged_visit(exact_judgement, exact, spelled, rule, lambda v: v)
        yardstick = judged_visit(plain_judgement, plain, spelled, rule, lambda v: v.to(dtype).to(v.dtype))
        got = op_visit(tensors, rule, optimizer, options | {"H": H[0]})
        assert got.keys() == expected.keys()
        assert {k: [v.shape for v in of] for k, of in got.items()} == {
            k: [v.shape for v in of] for k, of in yardstick.items()
        }
        rounded = worst_error(yardstick, expected) if dtype.itemsize == 2 else 0.0
        for name, values in got.items():
            if values:
                terms = terms_of(name, expected)
                what = f"visit {visit}, {name}"
                assert_quantity(values, expected[name], yardstick[name], terms, rounded, dtype, what)


def operands_of(dtype):
    """What the operands of the products are rounded to for samples of this dtype."""
    return dtype if dtype == torch.bfloat16 else None


def worst_error(plain, exact):
    """Relative to the largest element, of everything. z in 16 bits carries its roundings into all that follows, so that
    the error of a few energies is a matter of luck."""
    errors = [0.0]
    for name, values in plain.items():
        pairs = [(np.ravel(array(v).astype(np.float64)), np.ravel(w)) for v, w in zip(values, exact[name], strict=True)]
        if pairs:
            v, w = (np.concatenate(list(side)) for side in zip(*pairs, strict=True))
            errors.append(np.abs(v - w).max() / np.abs(w).max())
    return max(errors)


def terms_of(name, expected):
    """What the values are sums of, where that may be larger than they are: z - zhat, and <lambda, e> in energies."""
    if name == "residual":
        return expected["z"]
    if name == "energies":
        return [np.abs(lambda_ * z).sum() for lambda_, z in zip(expected["multiplier"], expected["z"], strict=False)]
    return []


def assert_quantity(got, expected, plain, terms, rounded, dtype, what):
    """All layers at once: the error of plain PyTorch in a handful of numbers says little. terms: what the values are
    sums of, whose magnitude the errors of rounding are relative to."""
    got, plain = (torch.cat([v.flatten() for v in values]) for values in (got, plain))
    expected = np.concatenate([np.ravel(v) for v in expected])
    if rounded:
        plain = torch.from_numpy((expected + rounded * np.abs(expected).max()).astype(np.float64))
    scale = max(np.abs(np.ravel(v)).max(initial=0) for v in (expected, *terms))
    assert_accurate(got, expected, array(plain), scale, accumulation_dtype(dtype), what)


@by_dtype
@by_hidden_loss
@by_preactivation
@by_activation
def test_visits(backend, activation, preactivation, hidden_loss, dtype):
    tensors = make((4, 6, 6, 6, 3), dtype=dtype, velocity=True)
    named = {"activation": activation, "preactivation": preactivation, "hidden_loss": hidden_loss}
    numbers = {"kappa": 0.6, "rho": [0.8, 1.2, 0.5], "skip": 1.0, "branch_scale": 0.7, "dual_step": 0.3}
    check(tensors, **named, **numbers, steps=2, step_size=0.1, z_momentum=0.5)


@by_dtype
@by_head
@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("multiplier", [False, True], ids=["no multiplier", "multiplier"])
@pytest.mark.parametrize("velocity", [False, True], ids=["no velocity", "velocity"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_steps_and_optional_tensors(backend, bias, velocity, multiplier, steps, head, dtype):
    tensors = make((5, 4, 4, 3), dtype=dtype, head=head, bias=bias, multiplier=multiplier, velocity=velocity)
    options = {"steps": steps, "head": head, "skip": 0.5, "rho": 0.7}
    check(tensors, visits=2, z_momentum=0.6 if velocity else 0.0, **options)


@pytest.mark.parametrize("rule", RULES)
@by_preactivation
@by_dtype
def test_several_visits_with_an_optimizer(backend, dtype, preactivation, rule):
    tensors = make((4, 5, 5, 3), dtype=dtype)
    check(tensors, rule=rule, visits=4, steps=2, preactivation=preactivation, skip=1.0, branch_scale=0.5)


@by_dtype
def test_options_of_their_own_for_every_layer(backend, dtype):
    tensors = make((5, 5, 5, 5, 4), dtype=dtype, velocity=True)
    named = {"activation": ["relu", "gelu", "sigmoid", "identity"], "hidden_loss": "huber", "kappa": 0.4}
    numbers = {"rho": [1.0, 0.0, 2.5], "skip": [1.0, -0.5, 0.3, 0.0], "branch_scale": [1.0, 0.3, -0.2, 0.8]}
    check(tensors, **named, **numbers, steps=3, dual_step=0.2, z_momentum=0.3, visits=2)


@by_preactivation
@by_dtype
def test_the_last_layer_of_a_squared_head_may_have_an_activation_and_a_skip(backend, dtype, preactivation):
    tensors = make((5, 5, 5, 5), dtype=dtype, head="squared")
    named = {"activation": ["tanh", "gelu", "sigmoid"], "skip": [0.0, 1.0, 0.5], "branch_scale": [1.0, 0.3, 2.0]}
    # Huber's kappa and rho are the hidden layers' alone
    check(tensors, head="squared", **named, preactivation=preactivation, hidden_loss="huber", kappa=0.1, rho=3.0)


def test_what_is_only_read_may_share_memory(backend):
    tensors = make((4, 4, 4), n=4, head="squared")
    tensors["target"] = tensors["x"]
    check(tensors, head="squared")


def test_a_dual_step_is_half_of_the_smallest_rho_where_none_is_given(backend):
    given, default = make(), make()
    torch.manual_seed(1)
    given, default = clone(given), clone(given)
    step(given, rho=[0.8, 0.6], dual_step=0.3, steps=2)
    step(default, rho=[0.8, 0.6], steps=2)
    assert_same(given, default)


H_KINDS = {
    "none": lambda C: (None, None),
    "dense": dense,
    "label_smoothing": lambda C: (
        lgd.Infogain.label_smoothing(0.2, C),
        0.8 * torch.eye(C, dtype=torch.float64) + 0.2 / C,
    ),
    "diagonal": lambda C: (lgd.Infogain.diagonal(torch.arange(1.0, C + 1)), torch.arange(1.0, C + 1).double().diag()),
}


@by_dtype
@pytest.mark.parametrize("ignored", [False, True], ids=["all rows", "ignored rows"])
@pytest.mark.parametrize("kind", H_KINDS)
def test_softmax_infogain_head(backend, kind, ignored, dtype):
    tensors, H = make((4, 5, 5, 6), dtype=dtype), H_KINDS[kind](6)
    if ignored:
        tensors["target"][::3] = -7
    check(tensors, H=H, ignore_index=-7, steps=2, step_size=0.05, visits=2)


def test_where_all_rows_are_ignored_the_head_has_no_loss(backend):
    tensors = make()
    tensors["target"].fill_(-100)
    energies = step(tensors)
    assert energies[-1] == 0 and energies[0] > 0
    assert not tensors["weight"][-1].grad.any() and not tensors["bias"][-1].grad.any()


@pytest.mark.parametrize("strided", [False, True], ids=["dense", "strided"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8], ids=dtype_name)
def test_labels(backend, dtype, strided):
    tensors = make()
    tensors["target"][2] = 255
    expected = clone(tensors)
    labels = tensors["target"].to(dtype)
    tensors["target"] = labels.repeat_interleave(3)[::3] if strided else labels
    assert same(step(tensors, ignore_index=255), step(expected, ignore_index=255))
    assert_same(tensors, expected, IN_PLACE)


@by_preactivation
def test_sizes_beyond_a_tile(backend, preactivation):
    """Partial tiles and panels, and more samples than go through the layers together."""
    tensors = make((40, 130, 33, 11), n=270, dtype=torch.float32)
    check(tensors, preactivation=preactivation, step_size=0.1, rule="momentum")


@by_preactivation
@pytest.mark.parametrize("head", ["softmax_infogain", "squared"])
@pytest.mark.parametrize("library", [True, False], ids=["with oneDNN", "without"])
def test_sizes_beyond_a_tile_in_bfloat16(backend, library, head, preactivation):
    """Of layers with even widths, whose products run in bfloat16 where the CPU can do that, and of an odd one."""
    tensors = make((40, 130, 66, 33, 12, 6), n=271, dtype=torch.bfloat16, head=head, velocity=True)
    with torch.backends.mkldnn.flags(enabled=library):
        check(tensors, preactivation=preactivation, head=head, step_size=0.1, z_momentum=0.5, rule="momentum")


@by_preactivation
@pytest.mark.parametrize("n", [9, 300])
def test_deep_nets(backend, n, preactivation):
    """So many layers that a thread takes several of them in a row, and moves their z as it goes."""
    tensors = make((4, *[6] * 20, 3), n=n, velocity=True)
    check(tensors, steps=2, z_momentum=0.5, dual_step=0.2, skip=1.0, branch_scale=0.3, preactivation=preactivation)


# ---------------------------------------------------------------------------------------------------------------------
# Samples in 16 bits
# ---------------------------------------------------------------------------------------------------------------------


@by_narrow_dtype
@by_head
@by_preactivation
def test_visits_in_16_bits(backend, preactivation, head, dtype):
    tensors = make((4, 6, 6, 3), n=9, dtype=dtype, head=head, velocity=True)
    options = {"preactivation": preactivation, "skip": 1.0, "branch_scale": 0.5, "dual_step": 0.4}
    check(tensors, head=head, steps=3, z_momentum=0.5, rule="momentum", visits=2, **options)


@by_narrow_dtype
@by_preactivation
@pytest.mark.parametrize("multiplier", [False, True], ids=["no multiplier", "multiplier"])
def test_an_update_in_16_bits_rounds_z_once(backend, multiplier, preactivation, dtype):
    """Half a rounding step, and the errors of float32: of a second rounding there would be twice as much. An operand in
    the middle between two numbers of bfloat16 may become either of them."""
    tensors = make((8, 16, 16, 16, 5), n=64, dtype=dtype, multiplier=multiplier)
    options = {"step_size": 0.2, "preactivation": preactivation, "skip": 1.0, "rho": 0.9}
    exact = State(**tensors).exact()
    spelled = spelled_out(4, 5, operands=operands_of(dtype), **options)
    judged = exact_judgement(exact, spelled)
    largest_m = max(float(np.abs(values).max()) for values in (*judged.e, *(exact.multiplier or [])))
    visit_(exact_judgement, exact, spelled)
    step(tensors, **options)
    largest_weight = max(float(weight.abs().max()) for weight in tensors["weight"])
    one_operand = 0.4 * torch.finfo(dtype).eps * largest_m * largest_weight if operands_of(dtype) else 0.0
    for z, expected in zip(tensors["z"], exact.z, strict=True):
        error = np.abs(z.double().numpy(force=True) - expected)
        # the distance to the next number is eps 2^exponent
        spacing = torch.finfo(dtype).eps * 2.0 ** np.floor(np.log2(np.abs(expected).astype(float)))
        allowed = 0.5 * spacing + 64 * torch.finfo(torch.float32).eps * float(np.abs(expected).max()) + one_operand
        assert (error <= allowed).all(), f"{(error / allowed).max():.3f} times half a rounding step"


@by_narrow_dtype
def test_steps_below_the_rounding_step_are_lost_in_16_bits(backend, dtype):
    tensors = make(dtype=dtype, multiplier=False)
    before = clone(tensors)
    step(tensors, step_size=1e-7)
    assert_same(tensors, before, ["z"])
    # and without a step of z its gradient still reaches the parameters
    assert all(g.dtype == torch.float32 and g.any() for g in gradients(tensors))


# ---------------------------------------------------------------------------------------------------------------------
# torch.optim
# ---------------------------------------------------------------------------------------------------------------------

SGD, Adam, AdamW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
OPTIMIZERS = {
    "sgd": functools.partial(SGD, lr=0.1),
    "sgd, decay": functools.partial(SGD, lr=0.1, weight_decay=0.05),
    "momentum": functools.partial(SGD, lr=0.1, momentum=0.9),
    "momentum, decay": functools.partial(SGD, lr=0.1, momentum=0.7, weight_decay=0.05),
    "adam": functools.partial(Adam, lr=0.02),
    "adam, decay": functools.partial(Adam, lr=0.02, betas=(0.8, 0.95), eps=1e-4, weight_decay=0.05),
    "adam, tensor": functools.partial(Adam, lr=torch.tensor(0.02, dtype=torch.float64)),
    "adamw": functools.partial(AdamW, lr=0.02),
    "adamw, decay": functools.partial(AdamW, lr=0.02, weight_decay=0.3, eps=1e-3),
    "adam, decoupled": functools.partial(Adam, lr=0.02, weight_decay=0.3, decoupled_weight_decay=True),
}
by_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
VISIT = {"steps": 2, "skip": 1.0, "hidden_loss": "huber", "kappa": 0.8}


def net_with_parameters(**options):
    tensors = make((4, 6, 6, 3), **options)
    for p in parameters(tensors):
        p.requires_grad_()
    return tensors


def copy_of(tensors):
    copied = clone({name: value for name, value in tensors.items() if name not in ("weight", "bias")})
    for name in ("weight", "bias"):
        copied[name] = [p.detach().clone().requires_grad_() for p in tensors[name]]
    return copied


def two_groups(tensors, make_optimizer):
    groups = [
        {"params": [*tensors["weight"][:2], tensors["bias"][2]]},
        {"params": [tensors["weight"][2], *tensors["bias"][:2]], "lr": 0.03, "weight_decay": 0.2},
    ]
    return make_optimizer(groups)


def one_group(tensors, make_optimizer):
    return make_optimizer(parameters(tensors))


def visit_by_torch(tensors, optimizer):
    energies = step(tensors, **VISIT)
    optimizer.step()
    return energies


def assert_parameters_close(fused, by_torch, optimizer, other, bound=1e-12):
    for t, (p, expected) in enumerate(zip(parameters(fused), parameters(by_torch), strict=True)):
        pairs = {"value": (p.detach(), expected.detach())}
        state, other_state = optimizer.state[p], other.state[expected]
        for name in set(state) | set(other_state):
            if other_state.get(name) is not None:
                pairs[name] = (state[name], other_state[name])
        for name, (got, wanted) in pairs.items():
            assert got.dtype == wanted.dtype and got.shape == wanted.shape
            error = (got - wanted).abs().max()
            assert error <= bound * max(float(wanted.abs().max()), 1e-30), f"{name} of parameter {t}: error {error:.3g}"


@pytest.mark.parametrize("grouped", [one_group, two_groups])
@by_optimizer
def test_optimizers_step_as_torch_does(backend, name, grouped):
    fused = net_with_parameters()
    by_torch = copy_of(fused)
    optimizer, other = (grouped(tensors, OPTIMIZERS[name]) for tensors in (fused, by_torch))
    for _ in range(5):
        torch.testing.assert_close(
            step(fused, optimizer=optimizer, **VISIT), visit_by_torch(by_torch, other), rtol=1e-12, atol=0
        )
        assert_parameters_close(fused, by_torch, optimizer, other)
    assert all(p.grad is None for p in parameters(fused))


@by_optimizer
def test_optimizers_step_as_torch_does_in_float32(backend, name):
    """Twice torch's own error, for one step from equal buffers."""
    fused = net_with_parameters(dtype=torch.float32)
    by_torch, exact = copy_of(fused), copy_of(fused)
    for name_of_list in ("weight", "bias"):
        exact[name_of_list] = [p.detach().double().requires_grad_() for p in exact[name_of_list]]
    optimizer, other, exactly = (one_group(tensors, OPTIMIZERS[name]) for tensors in (fused, by_torch, exact))
    for _ in range(3):
        visit_by_torch(by_torch, other)
        step(fused, optimizer=optimizer, **VISIT)
        for p, q in zip(parameters(exact), parameters(by_torch), strict=True):
            p.grad = q.grad.double()
        exactly.step()
    for p, q, r in zip(*([v.detach() for v in parameters(t)] for t in (fused, by_torch, exact)), strict=True):
        scale = float(r.abs().max())
        error = (p.double() - r).abs().max() / scale
        allowed = 2 * max(float((q.double() - r).abs().max() / scale), 2 * torch.finfo(torch.float32).eps)
        assert error <= allowed + torch.finfo(torch.float32).eps


def test_a_schedule_between_visits(backend):
    fused = net_with_parameters()
    by_torch = copy_of(fused)
    optimizer, other = (two_groups(tensors, OPTIMIZERS["adamw, decay"]) for tensors in (fused, by_torch))
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 4) for o in (optimizer, other)]
    for _ in range(4):
        step(fused, optimizer=optimizer, **VISIT)
        visit_by_torch(by_torch, other)
        optimizer.step()  # without gradients torch's own step moves nothing, and the schedules are content
        assert_parameters_close(fused, by_torch, optimizer, other)
        for schedule in schedules:
            schedule.step()
    assert optimizer.param_groups[0]["lr"] < 1e-12


@by_optimizer
def test_checkpoints(backend, name):
    tensors = net_with_parameters()
    optimizer = one_group(tensors, OPTIMIZERS[name])
    for _ in range(2):
        step(tensors, optimizer=optimizer, **VISIT)
    loaded = copy_of(tensors)
    fresh = one_group(loaded, OPTIMIZERS[name])
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(2):
        assert same(step(tensors, optimizer=optimizer, **VISIT), step(loaded, optimizer=fresh, **VISIT))
        assert_same(tensors, loaded)
    by_torch = copy_of(tensors)
    other = one_group(by_torch, OPTIMIZERS[name])
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(2):
        step(tensors, optimizer=optimizer, **VISIT)
        visit_by_torch(by_torch, other)
        assert_parameters_close(tensors, by_torch, optimizer, other)


@by_optimizer
def test_torch_goes_on_and_comes_back(backend, name):
    """torch.optim's own steps and fused ones take turns with one optimizer."""
    fused = net_with_parameters()
    by_torch = copy_of(fused)
    optimizer, other = (one_group(tensors, OPTIMIZERS[name]) for tensors in (fused, by_torch))
    for k in range(4):
        visit_by_torch(by_torch, other)
        if k % 2:
            step(fused, optimizer=optimizer, **VISIT)
        else:
            visit_by_torch(fused, optimizer)
        assert_parameters_close(fused, by_torch, optimizer, other)


def test_the_optimizer_may_know_more_than_the_net(backend):
    tensors, stranger = net_with_parameters(), torch.ones(3, dtype=torch.float64, requires_grad=True)
    before = clone(tensors)
    optimizer = Adam([*parameters(tensors), stranger])
    step(tensors, optimizer=optimizer)
    assert same(stranger.detach(), torch.ones(3, dtype=torch.float64)) and stranger not in optimizer.state
    assert not same(tensors["weight"][0], before["weight"][0])


def test_gradients_take_the_place_of_those_that_were_there(backend):
    tensors = make()
    step(tensors, steps=0)
    first = [g.clone() for g in gradients(tensors)]
    places = [g.data_ptr() for g in gradients(tensors)]
    step(tensors, steps=0)
    assert [g.data_ptr() for g in gradients(tensors)] == places
    assert all(same(g, before) for g, before in zip(gradients(tensors), first, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# What is known exactly
# ---------------------------------------------------------------------------------------------------------------------


@by_hidden_loss
@by_preactivation
@by_activation
def test_gradients_are_those_of_the_losses(backend, activation, preactivation, hidden_loss):
    tensors, H = net_with_parameters(n=6), dense(3)[0]
    T, last = 3, PLAIN[activation] if preactivation else PLAIN["identity"]
    names = [activation] * T
    names[0 if preactivation else -1] = "identity"
    shared = {"preactivation": preactivation, "hidden_loss": hidden_loss, "kappa": 0.6, "rho": [0.8, 1.3]}
    numbers = {"skip": [0.0, 0.7], "branch_scale": [0.9, -0.4]}
    inputs = [tensors["x"], *tensors["z"]]
    layers = ([v[: T - 1] for v in (inputs, tensors["weight"], tensors["bias"])], tensors["z"])
    of_hidden = lgd.decoupled_linear_loss(
        *layers[0], layers[1], multiplier=tensors["multiplier"], activation=names[: T - 1], **shared, **numbers
    )
    logits = 0.5 * last(inputs[-1]) @ tensors["weight"][-1].t() + tensors["bias"][-1]
    of_head = lgd.softmax_infogain_loss(logits, tensors["target"], H, reduction="sum")
    expected = torch.autograd.grad(of_hidden.sum() + of_head, parameters(tensors))

    lists = {"skip": [0.0, 0.7, 0.0], "branch_scale": [0.9, -0.4, 0.5]}
    energies = step(tensors, H=H, activation=names, steps=0, **shared, **lists)
    torch.testing.assert_close(energies, torch.cat([of_hidden, of_head[None]]).detach(), rtol=1e-12, atol=0)
    for got, wanted in zip(gradients(tensors), expected, strict=True):
        torch.testing.assert_close(got, wanted / 6, rtol=1e-11, atol=1e-12)


@by_preactivation
@by_activation
def test_backpropagation_is_where_z_stays(backend, activation, preactivation):
    """With z of the feed-forward pass and lambda = -dL/dz no step moves z, e is 0, and dE/dW is backpropagation's."""
    tensors = net_with_parameters()
    skip, scale, z = [0.0, 1.0, 0.0], 0.6, [tensors["x"]]
    o = spelled_out(3, 3, step_size=0.0, activation=activation, preactivation=preactivation)
    for t in range(3):
        a = scale * PLAIN[o.phi(t)](z[-1]) @ tensors["weight"][t].t() + tensors["bias"][t]
        z.append(skip[t] * z[-1] + PLAIN[o.f(t)](a) if skip[t] else PLAIN[o.f(t)](a))
    cost = torch.nn.functional.cross_entropy(z[-1], tensors["target"], reduction="sum")
    *adjoint, last = torch.autograd.grad(cost, (*z[1:-1], cost), retain_graph=True)
    assert last == 1
    expected = torch.autograd.grad(cost / len(z[0]), parameters(tensors))

    tensors["z"], tensors["multiplier"] = [v.detach().clone() for v in z[1:-1]], [-v for v in adjoint]
    before = clone(tensors)
    named = {"activation": activation, "preactivation": preactivation, "branch_scale": scale, "skip": 1.0}
    energies, residual = step(tensors, rho=0.7, steps=1, return_residual=True, **named)
    for got, wanted in zip((*tensors["z"], *tensors["multiplier"]), (*before["z"], *before["multiplier"]), strict=True):
        assert (got - wanted).abs().max() <= 1e-12
    assert all(e.abs().max() <= 1e-12 for e in residual)
    assert energies[:-1].abs().max() <= 1e-12
    torch.testing.assert_close(energies[-1], cost.detach())
    for got, wanted in zip(gradients(tensors), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-12)


def linear_equilibrium(weight, first, last):
    """(z_1 .. z_(T-1), q_1 .. q_T, twice the energy). S = I + the sum of the products of the later weights with their
    transposes; q_T = S^-1 (z_T - the feed-forward output); q_t = W_t^T q_(t+1)."""
    d = len(weight[0])
    spread, later = torch.eye(d, dtype=torch.float64), torch.eye(d, dtype=torch.float64)
    for w in weight[:0:-1]:
        later = later @ w
        spread = spread + later @ later.t()
    error = last - first @ (later @ weight[0]).t()
    q = [torch.linalg.solve(spread, error.t()).t()]
    for w in weight[:0:-1]:
        q.insert(0, q[0] @ w)
    z = [first]
    for w, q_t in zip(weight, q, strict=True):
        z.append(z[-1] @ w.t() + q_t)
    return z[1:-1], q, (error * q[-1]).sum()


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_a_linear_net_moves_to_its_equilibrium(backend, momentum):
    tensors = make((6, 6, 6, 6, 6), head="squared", bias=False, multiplier=False, velocity=momentum > 0, n=5)
    tensors["weight"] = [0.6 * w for w in tensors["weight"]]
    named = {"head": "squared", "activation": "identity", "z_momentum": momentum}
    energies, residual = step(tensors, steps=400, step_size=0.35, return_residual=True, **named)
    z, q, twice_the_energy = linear_equilibrium(tensors["weight"], tensors["x"], tensors["target"])
    torch.testing.assert_close(tensors["z"], z, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(layers_of(residual), q[:-1], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(energies.sum(), twice_the_energy / 2)
    inputs = [tensors["x"], *z]
    for w, q_t, z_t in zip(tensors["weight"], q, inputs, strict=True):
        torch.testing.assert_close(w.grad, -q_t.t() @ z_t / 5, rtol=1e-10, atol=1e-11)


@by_head
@by_preactivation
def test_z_follows_the_finite_differences_of_the_energy(backend, preactivation, head):
    tensors = make((3, 4, 4, 3), n=2, head=head)
    named = {"head": head, "preactivation": preactivation, "hidden_loss": "huber", "kappa": 0.7}
    numbers = {"rho": [0.7, 1.4], "skip": 1.0, "branch_scale": 0.6}
    moved, width = clone(tensors), 1e-5
    step(moved, step_size=1.0, dual_step=0.0, **named, **numbers)
    for t, z in enumerate(tensors["z"]):
        for place in range(z.numel()):
            energies = []
            for sign in (1, -1):
                nearby = clone(tensors)
                nearby["z"][t].view(-1)[place] += sign * width
                energies.append(step(nearby, steps=0, **named, **numbers).sum())
            slope = float(energies[0] - energies[1]) / (2 * width)
            followed = float((z - moved["z"][t]).view(-1)[place])
            assert followed == pytest.approx(slope, rel=1e-7, abs=1e-7), f"z[{t}] at {place}"


def test_steps_of_z_lower_the_energy(backend):
    tensors = make((4, 6, 6, 6, 3), multiplier=False)
    energies = [float(step(tensors, steps=1, step_size=0.05, skip=1.0).sum()) for _ in range(20)]
    assert all(after < before for before, after in itertools.pairwise(energies))


def test_the_step_of_the_multiplier_is_the_residual(backend):
    """With one step, lambda moves once, by the residual of the new z, which is the one that is returned."""
    tensors = make()
    before = clone(tensors)
    _, residual = step(tensors, dual_step=0.25, return_residual=True)
    for got, start, e in zip(tensors["multiplier"], before["multiplier"], layers_of(residual), strict=True):
        torch.testing.assert_close(got, start + 0.25 * e, rtol=1e-14, atol=1e-14)


def test_the_residual_is_a_list_like_z(backend):
    tensors = make((6, 6, 6, 6, 6, 3))
    for runs in (["1"] * 4, [4], [2, "1", "1"]):
        stacks = {name: cut(torch.stack(tensors[name]), runs) for name in ("z", "multiplier")}
        _, residual = step(tensors | stacks, steps=0, return_residual=True)
        assert [e.shape for e in residual] == [z.shape for z in stacks["z"]]


def test_without_steps_z_and_multiplier_stay(backend):
    tensors = make(velocity=True)
    before = clone(tensors)
    step(tensors, steps=0, dual_step=0.5, z_momentum=0.9)
    assert_same(tensors, before)
    assert all(g.any() for g in gradients(tensors))


def test_with_zero_steps_in_size_only_the_multiplier_moves(backend):
    tensors = make()
    before = clone(tensors)
    step(tensors, steps=3, step_size=0.0, dual_step=0.5)
    assert_same(tensors, before, ["z", "weight", "bias"])
    assert all(not same(a, b) for a, b in zip(tensors["multiplier"], before["multiplier"], strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Bit for bit
# ---------------------------------------------------------------------------------------------------------------------

ROUGH = {"steps": 3, "step_size": 0.1, "skip": 1.0, "branch_scale": 0.5}


def assert_same_products(first, second, names=ALL):
    """Bit for bit, but for the reference: the bits of a library's product depend on the strides of its operands."""
    if reference is backends.implementation("decoupled_step_", DEVICE.type):
        for name in names:
            for a, b in zip(listed(first[name]), listed(second[name]), strict=True):
                torch.testing.assert_close(a, b)
    else:
        assert_same(first, second, names)


def chosen_samples(tensors, samples):
    """The same net with these samples."""
    copied = clone(tensors)
    for name in ("x", "target"):
        copied[name] = tensors[name][samples].clone()
    for name in ("z", "multiplier", "velocity"):
        if tensors[name] is not None:
            copied[name] = [v[samples].clone() for v in tensors[name]]
    return copied


@by_preactivation
@pytest.mark.parametrize(("n", "d"), [(7, 5), (64, 64), (300, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_a_permuted_batch_with_a_sample_twice(compiled, dtype, n, d, preactivation):
    """What becomes of a sample does not depend on its place nor on its neighbours."""
    tensors = make((d, d, d, d, 9), n=n, dtype=dtype, velocity=True)
    samples = torch.cat([torch.randperm(n), torch.tensor([n // 2])])
    others = chosen_samples(tensors, samples)
    for given in (tensors, others):
        step(given, preactivation=preactivation, z_momentum=0.5, **ROUGH)
    expected = chosen_samples(tensors, samples)
    assert_same(others, expected, ["z", "multiplier", "velocity"])


def test_a_permuted_batch_in_float64(backend):
    """To tolerance, because a library's product runs."""
    tensors = make(n=64)
    samples = torch.cat([torch.randperm(64), torch.tensor([3])])
    others = chosen_samples(tensors, samples)
    for given in (tensors, others):
        step(given, **ROUGH)
    expected = chosen_samples(tensors, samples)
    for name in ("z", "multiplier"):
        torch.testing.assert_close(others[name], expected[name], rtol=1e-12, atol=1e-12)


def cut(stacks, runs):
    """A stack in runs of these lengths; a run of "1" is a single layer."""
    pieces, t = [], 0
    for run in runs:
        pieces.append(stacks[t].clone() if run == "1" else stacks[t : t + run].clone())
        t += int(run)
    return pieces


@by_preactivation
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("d", [5, 33, 64])
@pytest.mark.parametrize("make_optimizer", [None, SGD, Adam])
def test_how_the_lists_are_cut_changes_no_bit(backend, make_optimizer, d, dtype, preactivation):
    whole = make((d,) * 7, n=33, dtype=dtype, velocity=True, stacked=True)
    expected = energies = None
    for of_hidden, of_layers in (([5], [6]), (["1"] * 5, ["1"] * 6), ([2, "1", 2], ["1", 3, 2]), ([1, 4], [0, 5, 1])):
        tensors = whole | {k: cut(whole[k], of_hidden) for k in ("z", "multiplier", "velocity")}
        tensors |= {k: cut(whole[k], of_layers) for k in ("weight", "bias")}
        if of_hidden == [5]:
            tensors |= {k: tensors[k][0] for k in IN_PLACE}
        optimizer = None if make_optimizer is None else make_optimizer(parameters(tensors), lr=0.1)
        got = step(tensors, optimizer=optimizer, preactivation=preactivation, z_momentum=0.5, **ROUGH)
        layers = {k: torch.cat([v.reshape(-1, *whole[k].shape[1:]) for v in listed(tensors[k])]) for k in IN_PLACE} | {
            "energies": got
        }
        if make_optimizer is None:
            layers |= {"gradient": torch.cat([g.reshape(-1, d, d) for g in gradients(tensors)[: len(of_layers)]])}
        if expected is None:
            expected, energies = layers, got
        assert same(got, energies)
        assert_same(layers, expected, expected)


SHAPES = [
    *((T, n, d) for T in (1, 3, 32) for n, d in ((1, 1), (1, 64), (64, 5), (64, 64), (300, 5))),
    (3, 700, 64),
    (32, 300, 64),
    (3, 64, 130),
    (3, 300, 130),
    (1, 700, 130),
]


def visited(tensors, optimizer, **options):
    """A copy after two visits, with its energies."""
    tensors = clone(tensors)
    optimizer = optimizer(parameters(tensors), lr=0.1)
    return tensors, [step(tensors, optimizer=optimizer, **options) for _ in range(2)]


@pytest.mark.cpu
@by_preactivation
@pytest.mark.parametrize(("T", "n", "d"), SHAPES)
def test_threads_change_no_bit(compiled, threads, T, n, d, preactivation):
    tensors = make((d,) * T + (5,), n=n, dtype=torch.float32, velocity=True)
    results = []
    for count in (1, 2, 2):
        torch.set_num_threads(count)
        results.append(visited(tensors, Adam, preactivation=preactivation, z_momentum=0.5, **ROUGH))
    for other, energies in results[1:]:
        assert_same(other, results[0][0])
        assert all(same(a, b) for a, b in zip(energies, results[0][1], strict=True))


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=dtype_name)
def test_threads_change_no_bit_in_other_dtypes(compiled, threads, dtype):
    tensors, results = make((33,) * 9 + (5,), n=300, dtype=dtype), []
    for count in (1, 2, 3, 5):
        torch.set_num_threads(count)
        results.append(visited(tensors, SGD, **ROUGH))
    for other, energies in results[1:]:
        assert_same(other, results[0][0])
        assert all(same(a, b) for a, b in zip(energies, results[0][1], strict=True))


def test_twice_the_same_bits(backend):
    tensors = make((20, 33, 33, 7), n=70, dtype=torch.float32, velocity=True)
    (first, energies), (second, others) = (visited(tensors, Adam, z_momentum=0.5, **ROUGH) for _ in range(2))
    assert_same(first, second)
    assert all(same(a, b) for a, b in zip(energies, others, strict=True))


@by_preactivation
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize(("n", "d"), [(7, 5), (300, 33), (64, 64)])
def test_a_net_is_its_layers(backend, n, d, dtype, preactivation):
    """With rho = 1 a hidden layer's energy is a squared head's, and without steps of z every layer stands alone."""
    net = make((d,) * 5, n=n, dtype=dtype, head="squared", multiplier=False)
    layers, hidden = clone(net), [net["x"], *net["z"], net["target"]]
    named = {"head": "squared", "preactivation": preactivation, "steps": 0}
    optimizer = SGD(parameters(net), lr=0.1, momentum=0.9)
    energies = step(net, activation=["tanh"] * 4, skip=[1.0] * 4, branch_scale=0.5, optimizer=optimizer, **named)
    for t in range(4):
        layer = {"x": hidden[t], "z": [], "target": hidden[t + 1]}
        layer |= {name: layers[name][t : t + 1] for name in ("weight", "bias")}
        of_layer = SGD(parameters(layer), lr=0.1, momentum=0.9)
        energy = step(layer, activation=["tanh"], skip=[1.0], branch_scale=0.5, optimizer=of_layer, **named)
        assert same(energy, energies[t : t + 1])
        assert_same({k: net[k][t] for k in ("weight", "bias")}, {k: layer[k] for k in ("weight", "bias")}, ["bias"])
        assert same(net["weight"][t], layer["weight"][0])


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------


def every_other_row(dense):
    store = dense.new_full((dense.shape[0], 2 * dense.shape[1] + 1, dense.shape[2]), NAN)
    return store, store[:, 1::2]


def a_slice_of_samples(dense):
    store = dense.new_full((dense.shape[0], dense.shape[1] + 5, dense.shape[2]), NAN)
    return store, store[:, 3:-2]


def sample_major(dense):
    store = dense.new_full((dense.shape[1], dense.shape[0], dense.shape[2]), NAN)
    return store, store.transpose(0, 1)


def every_other_layer(dense):
    store = dense.new_full((2 * dense.shape[0] + 1, *dense.shape[1:]), NAN)
    return store, store[1::2]


def padded_rows(dense):
    store = dense.new_full((*dense.shape[:2], dense.shape[2] + 3), NAN)
    return store, store[..., 1:-2]


def every_other_column(dense):
    store = dense.new_full((*dense.shape[:2], 2 * dense.shape[2]), NAN)
    return store, store[..., ::2]


def columns_first(dense):
    store = dense.new_full((dense.shape[0], dense.shape[2], dense.shape[1]), NAN)
    return store, store.transpose(1, 2)


VIEWS = (
    every_other_row,
    a_slice_of_samples,
    sample_major,
    every_other_layer,
    padded_rows,
    every_other_column,
    columns_first,
)


def placed(dense, view):
    """(store, the tensor's values in a view of it)."""
    store, inside = view(dense)
    inside.copy_(dense)
    return store, inside


def assert_only_inside_written(store, inside):
    """NaN is everywhere in the store but in the view."""
    mask = torch.zeros_like(store, dtype=torch.bool)
    mask.as_strided(inside.shape, inside.stride(), inside.storage_offset()).fill_(True)
    assert store[~mask].isnan().all() and not store[mask].isnan().any()


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("d", [1, 6])
def test_views_of_larger_stores(backend, d, dtype, view):
    """z, multiplier and velocity where a caller stores them: the same bits as for tensors of their own, and nothing
    beside them is touched."""
    whole = make((4, d, d, d, 3), dtype=dtype, velocity=True)
    whole |= {name: torch.stack(whole[name]) for name in ("z", "multiplier", "velocity")}
    strided, stores = clone(whole), {}
    for name in ("z", "multiplier", "velocity"):
        stores[name], strided[name] = placed(whole[name], view)
    options = {"steps": 2, "z_momentum": 0.5, "skip": 1.0}
    energies = {"energies": step(strided, **options)}, {"energies": step(whole, **options)}
    assert_same_products(*energies, ["energies"])
    assert_same_products(strided, whole)
    for name, store in stores.items():
        assert_only_inside_written(store, strided[name])


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("make_optimizer", [SGD, Adam])
def test_parameters_that_are_views(backend, make_optimizer, view):
    whole = make((6, 6, 6, 6), head="squared", stacked=True)
    strided = clone(whole)
    store, strided["weight"] = placed(whole["weight"], view)
    of_bias, strided["bias"] = placed(whole["bias"].unsqueeze(1), view)
    strided["bias"] = strided["bias"].squeeze(1)
    optimizers = [make_optimizer(parameters(tensors), lr=0.01) for tensors in (whole, strided)]
    for _ in range(2):
        for tensors, optimizer in zip((whole, strided), optimizers, strict=True):
            step(tensors, head="squared", optimizer=optimizer, steps=2)
    assert_same_products(strided, whole)
    assert_only_inside_written(store, strided["weight"])
    assert_only_inside_written(of_bias, strided["bias"].unsqueeze(1))


def test_gradients_of_parameters_that_are_views(backend):
    whole = make((6, 6, 6, 6), head="squared", stacked=True)
    strided = clone(whole)
    strided["weight"] = strided["weight"].mT.contiguous().mT
    step(whole, head="squared"), step(strided, head="squared")
    assert_same_products({"gradient": gradients(strided)}, {"gradient": gradients(whole)}, ["gradient"])


def test_views_of_one_store_that_do_not_overlap(backend):
    """z, multiplier, velocity and x interleaved in one store, sample by sample."""
    whole = make((6, 6, 6, 6), velocity=True, stacked=False)
    store = torch.full((7, 3, 4, 6), NAN, dtype=torch.float64)
    strided = clone(whole)
    for i, name in enumerate(("z", "multiplier", "velocity")):
        strided[name] = store[:, 1:, i].transpose(0, 1)
        strided[name].copy_(torch.stack(whole[name]))
    strided["x"] = store[:, 0, 3].copy_(whole["x"])
    assert same(step(strided, z_momentum=0.5), step(whole, z_momentum=0.5))
    for name in ("z", "multiplier", "velocity"):
        assert same(strided[name], torch.stack(whole[name]))
    assert same(strided["x"], whole["x"])
    assert store[:, 1:, 3].isnan().all() and store[:, 0, :3].isnan().all()


@by_head
def test_inputs_of_any_strides(backend, head):
    tensors = make((6, 6, 6, 6), head=head)
    strided = clone(tensors)
    strided["x"] = tensors["x"].t().contiguous().t()
    if head == "squared":
        strided["target"] = tensors["target"].repeat_interleave(2, 1)[:, ::2]
    one_row = make((6, 6, 6, 6), head=head)
    one_row["x"] = one_row["x"][:1].expand(7, 6)
    for given, copied in ((strided, tensors), (one_row, clone(one_row) | {"x": one_row["x"].contiguous()})):
        step(given, head=head), step(copied, head=head)
        assert_same_products(given, copied)


@by_head
def test_inputs_are_not_modified(backend, head):
    tensors = make(head=head)
    matrix = torch.rand(3, 3, dtype=torch.float64)
    H = None if head == "squared" else lgd.Infogain.dense(matrix)
    before, matrix_before = clone(tensors), matrix.clone()
    versions = tensors["x"]._version, tensors["target"]._version
    step(tensors, head=head, H=H, steps=2)
    assert_same(tensors, before, ["x", "target"])
    assert same(matrix, matrix_before)
    assert (tensors["x"]._version, tensors["target"]._version) == versions


def test_autograd_notices_what_has_changed(backend):
    tensors = net_with_parameters(velocity=True)
    optimizer = Adam(parameters(tensors))
    step(tensors, optimizer=optimizer, z_momentum=0.5)
    buffers = [optimizer.state[p][name] for p in parameters(tensors) for name in ("exp_avg", "exp_avg_sq", "step")]
    changed = [t for name in IN_PLACE for t in listed(tensors[name])] + buffers
    versions = [t._version for t in changed]
    step(tensors, optimizer=optimizer, z_momentum=0.5)
    assert all(t._version > before for t, before in zip(changed, versions, strict=True))
    cost = (tensors["weight"][0] ** 2).sum()
    step(tensors, z_momentum=0.5, optimizer=optimizer)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        cost.backward()


def test_autograd_notices_a_new_gradient(backend):
    tensors = make()
    step(tensors)
    versions = [g._version for g in gradients(tensors)]
    step(tensors)
    assert all(g._version > before for g, before in zip(gradients(tensors), versions, strict=True))


def test_a_store_notices_that_its_view_has_changed(backend):
    tensors = make(stacked=False)
    store, tensors["z"] = placed(torch.stack(tensors["z"]), sample_major)
    version = store._version
    step(tensors)
    assert store._version > version


def test_what_requires_grad_is_left_out_of_the_graph(backend):
    tensors = net_with_parameters()
    tensors["x"].requires_grad_()
    energies, residual = step(tensors, return_residual=True)
    assert not energies.requires_grad and not any(e.requires_grad for e in residual)
    assert all(not g.requires_grad for g in gradients(tensors))
    assert all(p.requires_grad and p.is_leaf for p in parameters(tensors))


@pytest.mark.cpu
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the resident set from /proc")
def test_many_steps_in_place_leave_the_resident_set_flat(backend, threads):
    torch.set_num_threads(1)  # threads that wait for each other on a busy machine would make it slow

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    tensors = make((16, 32, 32, 5), n=32, dtype=torch.float32, velocity=True)
    optimizer = Adam(parameters(tensors), lr=1e-4)

    def visits(count):
        for _ in range(count):
            step(tensors, optimizer=optimizer, steps=1, z_momentum=0.5, return_residual=True)

    visits(100)
    before = resident()
    visits(1000)
    assert resident() <= 1.01 * before
    assert all(v.isfinite().all() for v in tensors["z"])


# ---------------------------------------------------------------------------------------------------------------------
# Sizes
# ---------------------------------------------------------------------------------------------------------------------


@by_head
@by_preactivation
def test_no_samples(backend, preactivation, head):
    tensors = make(n=0, head=head)
    before = clone(tensors)
    energies, residual = step(tensors, steps=2, head=head, preactivation=preactivation, return_residual=True)
    assert same(energies, torch.zeros(3, dtype=torch.float64))
    assert [e.shape for e in layers_of(residual)] == [(0, 6), (0, 6)]
    assert_same(tensors, before)
    assert all(same(g, torch.zeros_like(p)) for g, p in zip(gradients(tensors), parameters(tensors), strict=True))


def test_no_samples_with_an_optimizer(backend):
    """The gradients are 0, and the rest of the optimizer goes on."""
    tensors = make(n=0)
    before = clone(tensors)
    step(tensors, optimizer=AdamW(parameters(tensors), lr=0.1, weight_decay=0.5))
    for got, start in zip(parameters(tensors), parameters(before), strict=True):
        torch.testing.assert_close(got, 0.95 * start, rtol=1e-15, atol=0)


@pytest.mark.parametrize("z", [[], (), torch.empty(0, 7, 6, dtype=torch.float64)], ids=["list", "tuple", "tensor"])
@by_head
def test_one_layer_has_no_hidden_values(backend, head, z):
    tensors = make((4, 6), head=head)
    check(clone(tensors), head=head, steps=2, dual_step=0.1)
    expected = clone(tensors)
    energies, residual = step(tensors | {"z": z, "multiplier": z}, head=head, return_residual=True)
    assert same(energies, step(expected, head=head))
    assert all(e.numel() == 0 for e in residual)
    for got, wanted in zip(gradients(tensors), gradients(expected), strict=True):
        assert same(got, wanted)


@pytest.mark.parametrize(
    "sizes", [(1, 1), (1, 1, 1), (3, 1, 5, 2), (2, 9, 1, 17, 3), (5, 33, 65, 16, 4), (4, 6, 6, 1)], ids=str
)
@pytest.mark.parametrize("n", [1, 6])
def test_widths_that_differ(backend, n, sizes):
    check(make(sizes, n=n, dtype=torch.float32, velocity=True), steps=2, z_momentum=0.4, visits=2)


@by_dtype
def test_one_class_has_nothing_to_learn(backend, dtype):
    tensors = make((4, 6, 6, 1), dtype=dtype)
    energies = step(tensors)
    assert energies[-1] == 0 and not tensors["weight"][-1].grad.any() and not tensors["bias"][-1].grad.any()


def test_one_class_of_a_squared_head(backend):
    check(make((4, 6, 1), head="squared"), head="squared", steps=2)


@pytest.mark.parametrize("sizes", [(0, 4, 3), (4, 0, 3), (4, 5, 0, 3)], ids=str)
@by_preactivation
@by_dtype
def test_width_zero(backend, dtype, preactivation, sizes):
    check(make(sizes, dtype=dtype), steps=2, preactivation=preactivation)


@by_preactivation
def test_a_head_without_outputs_pulls_at_nothing(backend, preactivation):
    tensors = make((4, 5, 0), head="squared")
    step(make((4, 5, 5), head="squared"), head="squared")  # leaves numbers in the scratch memory
    check(tensors, head="squared", steps=2, preactivation=preactivation)


def test_stacks_of_no_layers_are_no_layers(backend):
    whole = make((6, 6, 6), head="squared", stacked=True)
    lists = clone(whole)
    lists["z"] = [lists["z"][:0].clone(), lists["z"]]
    assert same(step(lists, head="squared"), step(whole, head="squared"))
    assert same(lists["z"][1], whole["z"])


def test_sequences_of_any_kind(backend):
    tensors = make(velocity=True)
    as_tuples = {k: tuple(v) if isinstance(v, list) else v for k, v in clone(tensors).items()}
    options = {"rho": [0.5, 0.7], "skip": [0.0, 1.0, 0.0], "activation": ["tanh", "relu", "identity"]}
    expected = step(tensors, **options)
    assert same(step(as_tuples, **{k: tuple(v) for k, v in options.items()}), expected)
    assert_same(as_tuples, tensors)


# ---------------------------------------------------------------------------------------------------------------------
# NaN
# ---------------------------------------------------------------------------------------------------------------------


def test_nan_of_one_sample_stays_there(backend):
    tensors = make((4, 6, 6, 6, 3), n=9, velocity=True)
    tensors["z"][1][4, 2] = NAN
    energies, residual = step(tensors, steps=1, return_residual=True)
    assert energies[1:3].isnan().all()
    for name in ("z", "multiplier", "velocity"):
        for layer in tensors[name]:
            bad = layer.isnan().any(1)
            assert not bad[torch.arange(9) != 4].any()
    assert layers_of(residual)[1][4].isnan().any() and tensors["weight"][1].grad.isnan().any()


# ---------------------------------------------------------------------------------------------------------------------
# torch's own machinery
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["gradient", "sgd", "momentum", "adam"])
@by_head
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=dtype_name)
def test_opcheck(dtype, head, rule):
    tensors = make((4, 6, 6, 3), dtype=dtype, head=head, velocity=True)
    arguments = arguments_of_op(tensors, rule, head)
    torch.library.opcheck(ops.decoupled_step_, arguments, test_utils=("test_schema", "test_faketensor"))


def test_opcheck_without_optional_lists():
    tensors = make((4, 6, 6, 3), bias=False, multiplier=False)
    arguments = arguments_of_op(tensors, "sgd")
    torch.library.opcheck(ops.decoupled_step_, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.filterwarnings("ignore:Dynamo")
@pytest.mark.parametrize("make_optimizer", [None, SGD, Adam])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_inside_a_compiled_function(compiled, compiler, make_optimizer):
    torch._dynamo.reset()
    plain, traced = net_with_parameters(dtype=torch.float32, velocity=True), None
    traced = copy_of(plain)
    optimizers = [None if make_optimizer is None else make_optimizer(parameters(v), lr=0.1) for v in (plain, traced)]

    def twice_the_energies(tensors, optimizer):
        return 2 * step(tensors, optimizer=optimizer, z_momentum=0.5, **VISIT)

    in_graph = torch.compile(twice_the_energies, backend=compiler)
    for _ in range(3):
        assert same(in_graph(traced, optimizers[1]), twice_the_energies(plain, optimizers[0]))
        assert_same(traced, plain)
        if make_optimizer is None:
            assert all(same(a, b) for a, b in zip(gradients(traced), gradients(plain), strict=True))


def test_autocast_leaves_it_alone(backend):
    tensors = make(dtype=torch.float32)
    under_autocast = clone(tensors)
    expected = step(tensors)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert same(step(under_autocast), expected)
    assert_same(under_autocast, tensors)
    assert all(same(a, b) for a, b in zip(gradients(under_autocast), gradients(tensors), strict=True))


def test_in_inference_mode(backend):
    tensors = make()
    others = clone(tensors)
    with torch.inference_mode():
        made_here = clone(tensors)
        results = [step(others, steps=2), step(made_here, steps=2)]
    expected = step(tensors, steps=2)
    assert all(same(energies, expected) for energies in results)
    assert_same(others, tensors)
    assert_same(made_here, tensors)
