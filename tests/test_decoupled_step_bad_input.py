"""What decoupled_step_ refuses, in its own words, and that it has written nothing then."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from step_nets import (
    SERVED_BY,
    clone,
    gradients,
    make,
    net,
    parameters,
    same,
    step,
)
from torch.optim import SGD, Adam, AdamW

import lgd_kernels as lgd
from lgd_kernels import backends

pytestmark = pytest.mark.cpu  # no kernel for another device yet

NAN = float("nan")


@pytest.fixture(params=SERVED_BY)
def backend(request, nan_prefill):
    with backends.force(request.param):
        yield request.param


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------


def changed_at(name, i, value):
    """A change of entry i of a list."""

    def change(tensors):
        entries = list(tensors[name])
        entries[i] = value(entries[i]) if callable(value) else value
        return {name: entries}

    return change


def given(**changes):
    return lambda tensors: changes


def of_net(name, function):
    return lambda tensors: {name: function(tensors)}


FITS = r"for x of shape \(4, 3\) and 3 layers of weight"
BAD_TENSORS = {
    "x None": (given(x=None), TypeError, r"x: expected a torch.Tensor, got NoneType"),
    "x of ints": (of_net("x", lambda a: a["x"].int()), TypeError, r"x: dtype must be float64, .* got torch.int32"),
    "x of 3 dimensions": (
        of_net("x", lambda a: a["x"][None]),
        ValueError,
        r"x: expected 2 dimensions, got 3 \(shape \(1, 4, 3\)\)",
    ),
    "x too wide": (
        given(x=torch.zeros(4, 6)),
        ValueError,
        r"weight: layer 0 has d_in 3 \(shape \(5, 3\)\), but x has 6",
    ),
    "x too long": (
        given(x=torch.zeros(6, 3)),
        ValueError,
        r"z: layer 0 has shape \(4, 5\), but for x of shape \(6, 3\) .* must be \(6, 5\)",
    ),
    "z None": (given(z=None), TypeError, r"z: expected a torch.Tensor or a list of them, got NoneType"),
    "z None inside": (changed_at("z", 1, None), TypeError, r"z\[1\]: expected a torch.Tensor, got NoneType"),
    "z of 2 dimensions": (
        given(z=torch.zeros(4, 5)),
        ValueError,
        r"z: expected 3 dimensions, got 2 \(shape \(4, 5\)\)",
    ),
    "z of 1 dimension": (
        changed_at("z", 0, torch.zeros(5)),
        ValueError,
        r"z\[0\]: expected 2 or 3 dimensions, got 1 \(shape \(5,\)\)",
    ),
    "too few z": (
        of_net("z", lambda a: a["z"][:1]),
        ValueError,
        rf"z: has 1 layers, but {FITS} there must be 2",
    ),
    "too many z": (
        of_net("z", lambda a: [*a["z"], torch.zeros(4, 5)]),
        ValueError,
        rf"z: has 3 layers, but {FITS} there must be 2",
    ),
    "too few weights": (
        of_net("weight", lambda a: a["weight"][:2]),
        ValueError,
        r"bias: has 3 layers, but for the layers of weight there must be 2",
    ),
    "no weights": (given(weight=[]), ValueError, r"weight: expected at least 1 layer, got none"),
    "weight None": (given(weight=None), TypeError, r"weight: expected a torch.Tensor or a list of them, got NoneType"),
    "weight transposed": (
        changed_at("weight", 2, lambda w: w.t()),
        ValueError,
        r"weight: layer 2 has d_in 2 \(shape \(5, 2\)\), but layer 1 has d_out 5",
    ),
    "weight too wide": (
        changed_at("weight", 1, torch.zeros(5, 6)),
        ValueError,
        r"weight: layer 1 has d_in 6 \(shape \(5, 6\)\), but layer 0 has d_out 5",
    ),
    "too few biases": (
        of_net("bias", lambda a: a["bias"][:2]),
        ValueError,
        r"bias: has 2 layers, but for the layers of weight there must be 3",
    ),
    "bias too long": (
        changed_at("bias", 1, torch.zeros(6)),
        ValueError,
        r"bias: layer 1 has shape \(6,\), but for the layers of weight it must be \(5,\)",
    ),
    "bias of 1 dimension": (
        given(bias=torch.zeros(5)),
        ValueError,
        r"bias: expected 2 dimensions, got 1 \(shape \(5,\)\)",
    ),
    "bias a number": (given(bias=0.0), TypeError, r"bias: expected a torch.Tensor or a list of them, got float"),
    "labels too short": (
        of_net("target", lambda a: a["target"][:3]),
        ValueError,
        r"target: expected shape \(4,\) for x of shape \(4, 3\), got \(3,\)",
    ),
    "labels of 2 dimensions": (
        of_net("target", lambda a: a["target"][:, None]),
        ValueError,
        r"target: expected shape \(4,\) .* got \(4, 1\)",
    ),
    "labels of floats": (
        of_net("target", lambda a: a["target"].float()),
        TypeError,
        r"target: dtype must be int64 or uint8 .* got torch.float32",
    ),
    "labels of int32": (
        of_net("target", lambda a: a["target"].int()),
        TypeError,
        r"target: dtype must be int64 or uint8 .* got torch.int32",
    ),
    "labels in a list": (given(target=[0, 1, 0, 1]), TypeError, r"target: expected a torch.Tensor, got list"),
    "labels elsewhere": (
        of_net("target", lambda a: a["target"].to("meta")),
        ValueError,
        r"target: is on meta, but x is on cpu",
    ),
    "label too large": (
        given(target=torch.tensor([0, 1, 2, 0])),
        IndexError,
        r"value 2 at position 2 is out of range for 2 classes",
    ),
    "label negative": (
        given(target=torch.tensor([0, -1, 1, 0])),
        IndexError,
        r"value -1 at position 1 is out of range for 2 classes",
    ),
    "double among floats": (
        of_net("x", lambda a: a["x"].double()),
        TypeError,
        r"z\[0\]: has dtype torch.float32, expected torch.float64 for x of dtype torch.float64",
    ),
    "weight in 16 bits": (
        changed_at("weight", 1, lambda w: w.bfloat16()),
        TypeError,
        r"weight\[1\]: has dtype torch.bfloat16, expected torch.float32 for x of dtype torch.float32",
    ),
    "weight in 16 bits like x": (
        lambda a: {
            "x": a["x"].half(),
            **{k: [v.half() for v in a[k]] for k in ("z", "multiplier", "velocity", "weight", "bias")},
        },
        TypeError,
        r"weight\[0\]: has dtype torch.float16, expected torch.float32 for x of dtype torch.float16",
    ),
    "weight in 64 bits": (
        changed_at("weight", 2, lambda w: w.double()),
        TypeError,
        r"weight\[2\]: has dtype torch.float64, expected torch.float32",
    ),
    "bias in 64 bits": (
        changed_at("bias", 0, lambda b: b.double()),
        TypeError,
        r"bias\[0\]: has dtype torch.float64, expected torch.float32",
    ),
    "weight elsewhere": (
        changed_at("weight", 0, lambda w: w.to("meta")),
        ValueError,
        r"weight\[0\]: is on meta, but x is on cpu",
    ),
}
for _name in ("z", "multiplier", "velocity"):
    BAD_TENSORS |= {
        f"{_name} too wide": (
            changed_at(_name, 1, torch.zeros(4, 6)),
            ValueError,
            rf"{_name}: layer 1 has shape \(4, 6\), but {FITS} it must be \(4, 5\)",
        ),
        f"{_name} too short": (
            changed_at(_name, 0, torch.zeros(3, 5)),
            ValueError,
            rf"{_name}: layer 0 has shape \(3, 5\), but {FITS} it must be \(4, 5\)",
        ),
        f"{_name} of another dtype": (
            changed_at(_name, 1, lambda v: v.double()),
            TypeError,
            rf"{_name}\[1\]: has dtype torch.float64, expected torch.float32 for x of dtype torch.float32",
        ),
        f"{_name} expanded": (
            changed_at(_name, 0, lambda v: v[:1].expand(4, 5)),
            ValueError,
            rf"{_name}\[0\]: has elements that share their memory \(strides \(0, 1\)\)",
        ),
        f"{_name} a number": (
            given(**{_name: 0.0}),
            TypeError,
            rf"{_name}: expected a torch.Tensor or a list of them, got float",
        ),
        f"{_name} in one list too many": (
            of_net(_name, lambda a, name=_name: [*a[name], torch.zeros(1, 4, 5)]),
            ValueError,
            rf"{_name}: has 3 layers, but {FITS} there must be 2",
        ),
    }
BAD_TENSORS["weight expanded"] = (
    changed_at("weight", 1, lambda w: w[:1].expand(5, 5)),
    ValueError,
    r"weight\[1\]: has elements that share their memory",
)


def assert_nothing_happens(tensors, error, message, **options):
    before = clone(tensors)
    with pytest.raises(error, match=message):
        step(tensors, **options)
    for name, value in tensors.items():
        for got, start in zip(listed_tensors(value), listed_tensors(before[name]), strict=True):
            assert got.is_meta or same(got, start), f"{name} was written"
    untouched = [p for name in ("weight", "bias") for p in listed_tensors(tensors[name])]
    assert all(p.grad is None for p in untouched), "a gradient was put down"


def listed_tensors(value):
    entries = value if isinstance(value, (list, tuple)) else [value]
    return [v for v in entries if isinstance(v, torch.Tensor)]


@pytest.mark.parametrize("what", BAD_TENSORS)
def test_bad_tensors(backend, what):
    change, error, message = BAD_TENSORS[what]
    tensors = net()
    assert_nothing_happens(tensors | change(tensors), error, message)


BAD_OPTIONS = [
    ({"step_size": -0.1}, ValueError, r"step_size: must not be negative, got -0.1"),
    ({"step_size": NAN}, ValueError, r"step_size: must be finite, got nan"),
    ({"step_size": "0.1"}, TypeError, r"step_size: expected a number, got str '0.1'"),
    ({"step_size": None}, TypeError, r"step_size: expected a number, got NoneType"),
    ({"steps": -1}, ValueError, r"steps: must not be negative, got -1"),
    ({"steps": 1.0}, TypeError, r"steps: expected an int, got float 1.0"),
    ({"steps": True}, TypeError, r"steps: expected an int, got bool True"),
    ({"dual_step": -0.5}, ValueError, r"dual_step: must not be negative, got -0.5"),
    ({"dual_step": float("inf")}, ValueError, r"dual_step: must be finite, got inf"),
    ({"z_momentum": 1.0}, ValueError, r"z_momentum: must be less than 1, got 1.0"),
    ({"z_momentum": -0.5}, ValueError, r"z_momentum: must not be negative, got -0.5"),
    ({"z_momentum": 0.5, "velocity": None}, ValueError, r"velocity: is needed for z_momentum 0.5, got None"),
    ({"ignore_index": 0.5}, TypeError, r"ignore_index: expected an int, got float 0.5"),
    ({"head": "mse"}, ValueError, r"head: unknown value 'mse'; choose one of 'softmax_infogain', 'squared'"),
    ({"activation": "swish"}, ValueError, r"activation: unknown value 'swish'; choose one of 'identity', 'relu'"),
    ({"activation": ["tanh"] * 2}, ValueError, r"activation: has 2 values, but there are 3 layers"),
    ({"activation": ["tanh"] * 3}, ValueError, r"activation: the last .* must be 'identity' for .* got 'tanh'"),
    ({"hidden_loss": "mse"}, ValueError, r"hidden_loss: unknown value 'mse'; choose one of 'squared', 'huber'"),
    ({"preactivation": 1}, TypeError, r"preactivation: expected True or False, got int 1"),
    ({"preactivation": None}, TypeError, r"preactivation: expected True or False, got NoneType"),
    ({"return_residual": 1}, TypeError, r"return_residual: expected True or False, got int 1"),
    ({"kappa": 0.0}, ValueError, r"kappa: must be positive, got 0.0"),
    ({"kappa": -1.0}, ValueError, r"kappa: must be positive, got -1.0"),
    ({"kappa": NAN}, ValueError, r"kappa: must be positive, got nan"),
    ({"rho": -0.5}, ValueError, r"rho: must not be negative, got -0.5"),
    ({"rho": [1.0, -0.5]}, ValueError, r"rho: must not be negative, got -0.5"),
    ({"skip": [0.0, 1.0, 1.0]}, ValueError, r"skip: is 1.0 for layer 2, which needs d_in == d_out, got 5 and 2"),
    ({"rho": [1.0]}, ValueError, r"rho: has 1 values, but there are 2 hidden values"),
    ({"rho": float("inf")}, ValueError, r"rho: must be finite, got inf"),
    ({"rho": {}}, TypeError, r"rho: expected a number, or a list with one per layer, got dict"),
    ({"rho": {1.0, 2.0}}, TypeError, r"rho: expected a number, or a list with one per layer, got set"),
    ({"rho": np.ones(2)}, TypeError, r"rho: expected a number, or a list with one per layer, got ndarray"),
    ({"rho": [[1.0], [1.0]]}, TypeError, r"rho: expected a number, or a list with one per layer, got list"),
    ({"rho": torch.ones(2)}, TypeError, r"rho: expected a number, or a list with one per layer, got Tensor"),
    ({"skip": {}}, TypeError, r"skip: expected a number, or a list with one per layer, got dict"),
    ({"skip": [1.0, 0.0, 0.0]}, ValueError, r"skip: is 1.0 for layer 0, which needs d_in == d_out, got 3 and 5"),
    ({"skip": [0.0, 1.0, 0.5]}, ValueError, r"skip: is 0.5 for layer 2, which needs d_in == d_out, got 5 and 2"),
    ({"skip": [0.0, 1.0]}, ValueError, r"skip: has 2 values, but there are 3 layers"),
    ({"skip": NAN}, ValueError, r"skip: must be finite, got nan"),
    ({"branch_scale": [1.0] * 4}, ValueError, r"branch_scale: has 4 values, but there are 3 layers"),
    ({"branch_scale": float("inf")}, ValueError, r"branch_scale: must be finite, got inf"),
    ({"branch_scale": {}}, TypeError, r"branch_scale: expected a number, or a list with one per layer, got dict"),
    ({"H": lgd.Infogain.dense(torch.eye(3))}, ValueError, r"H: .*3.* 2 "),
    ({"H": torch.eye(2)}, TypeError, r"H: expected an lgd.Infogain, got Tensor"),
    ({"optimizer": "adam"}, TypeError, r"optimizer: expected torch.optim's SGD, Adam or AdamW, got str"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD_OPTIONS, ids=lambda value: str(value)[:60])
def test_bad_options(backend, options, error, message):
    tensors = net()
    tensors |= {name: value for name, value in options.items() if name in tensors}
    options = {name: value for name, value in options.items() if name not in tensors}
    assert_nothing_happens(tensors, error, message, **options)


@pytest.mark.parametrize(
    ("good", "bad", "message"),
    [
        ({"preactivation": True}, {"preactivation": 1}, r"preactivation: expected True or False, got int 1"),
        ({"preactivation": False}, {"preactivation": 0.0}, r"preactivation: expected True or False, got float 0.0"),
    ],
)
def test_what_was_checked_before_is_checked_again(backend, good, bad, message):
    """True and 1 are equal and have the same hash, but they are not the same option."""
    step(net(), **good)
    assert_nothing_happens(net(), TypeError, message, **bad)


def test_bad_input_of_a_squared_head(backend):
    tensors = make((3, 5, 2), n=4, dtype=torch.float32, head="squared")
    target = tensors["target"]
    H = lgd.Infogain.dense(torch.eye(2))
    for change, options, error, message in (
        ({}, {"H": H}, ValueError, r"H: .*dense.* needs head='softmax_infogain', got head='squared'"),
        ({"target": target[:, :1]}, {}, ValueError, r"target: expected shape \(4, 2\) for x of .* got \(4, 1\)"),
        ({"target": target[:3]}, {}, ValueError, r"target: expected shape \(4, 2\) for x of .* got \(3, 2\)"),
        ({"target": target[0]}, {}, ValueError, r"target: expected 2 dimensions, got 1 \(shape \(2,\)\)"),
        ({"target": target.double()}, {}, TypeError, r"target: has dtype torch.float64, but x has .* torch.float32"),
        ({"target": torch.zeros(4, dtype=torch.int64)}, {}, TypeError, r"target: dtype must be .* got torch.int64"),
        ({"target": target.to("meta")}, {}, ValueError, r"target: is on meta, but x is on cpu"),
        ({"target": None}, {}, TypeError, r"target: expected a torch.Tensor, got NoneType"),
    ):
        assert_nothing_happens(tensors | change, error, message, head="squared", **options)


@pytest.mark.parametrize(
    "pair",
    [
        ("z", "target"),
        ("z", "x"),
        ("multiplier", "z"),
        ("velocity", "z"),
        ("velocity", "multiplier"),
        ("weight", "z"),
        ("weight", "x"),
        ("multiplier", "target"),
        ("z", "z"),
        ("weight", "weight"),
    ],
    ids="-".join,
)
@pytest.mark.parametrize("shifted", [False, True], ids=["same", "partly"])
def test_shared_memory(backend, shifted, pair):
    tensors = make((4, 4, 4, 4), n=4, head="squared", velocity=True)
    store = torch.zeros(6, 4, dtype=torch.float64)
    views = store[:4], store[2:] if shifted else store[:4]
    for i, (name, view) in enumerate(zip(pair, views, strict=True)):
        if isinstance(tensors[name], list):
            tensors[name][i] = view
        else:
            tensors[name] = view
    first, second = pair
    message = rf"({first}: shares memory with {second}|{second}: shares memory with {first}), and .* in place"
    assert_nothing_happens(tensors, ValueError, message, head="squared")


def test_records_of_samples_behind_something_else(backend):
    """Columns of one store that starts in the middle of its memory do not overlap."""
    tensors = make((4, 4, 4, 4), n=4, head="squared")
    columns = torch.randn(3 + 4 * 12, dtype=torch.float64)[3:].view(4, 12)
    tensors["x"], tensors["z"] = columns[:, :4], [columns[:, 4:8], columns[:, 8:]]
    step(tensors, head="squared")


def test_memory_shared_across_dtypes(backend):
    tensors = make((4, 4, 4), n=4, dtype=torch.bfloat16, head="squared")
    memory = torch.zeros(64)
    tensors["weight"][0] = memory[:16].view(4, 4)
    tensors["z"][0] = memory.view(torch.bfloat16)[24:40].view(4, 4)
    assert_nothing_happens(tensors, ValueError, r"z: shares memory with weight", head="squared")


def test_gradients_alone_leave_the_version_of_parameters(backend):
    tensors = net()
    versions = [p._version for p in parameters(tensors)]
    step(tensors)
    assert [p._version for p in parameters(tensors)] == versions


def test_a_gradient_that_overlaps_itself_is_replaced(backend):
    tensors = net()
    tensors["weight"][0].grad = torch.ones(()).expand(5, 3)
    step(tensors)
    assert tensors["weight"][0].grad.is_contiguous()


def test_shared_memory_of_interleaved_views(backend):
    """Every other row, and rows of which one is among them."""
    tensors = make((4, 4, 4, 4), n=4, head="squared")
    store = torch.zeros(12, 4, dtype=torch.float64)
    tensors["z"][0], tensors["z"][1] = store[0:8:2], store[3::2][:4]
    step(tensors, head="squared")
    tensors["z"][1] = store[4:8]
    for p in parameters(tensors):
        p.grad = None
    assert_nothing_happens(tensors, ValueError, r"z: shares memory with z", head="squared")


# ---------------------------------------------------------------------------------------------------------------------
# Bad optimizers
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make_optimizer", "error", "message"),
    [
        (functools.partial(SGD, lr=0.1, momentum=0.9, nesterov=True), ValueError, r"nesterov=True is not supported"),
        (functools.partial(SGD, lr=0.1, momentum=0.9, dampening=0.5), ValueError, r"dampening=0.5 is not supported"),
        (functools.partial(SGD, lr=0.1, maximize=True), ValueError, r"maximize=True is not supported"),
        (functools.partial(Adam, amsgrad=True), ValueError, r"amsgrad=True is not supported"),
        (functools.partial(AdamW, amsgrad=True), ValueError, r"amsgrad=True is not supported"),
        (functools.partial(AdamW, maximize=True), ValueError, r"maximize=True is not supported"),
        (torch.optim.RMSprop, TypeError, r"expected torch.optim's SGD, Adam or AdamW, got RMSprop"),
        (torch.optim.NAdam, TypeError, r"expected torch.optim's SGD, Adam or AdamW, got NAdam"),
        (type("Mine", (SGD,), {}), TypeError, r"expected torch.optim's SGD, Adam or AdamW, got Mine"),
    ],
)
def test_unsupported_optimizers(backend, make_optimizer, error, message):
    tensors = net()
    optimizer = make_optimizer(parameters(tensors))
    assert_nothing_happens(tensors, error, f"optimizer: {message}", optimizer=optimizer)
    assert not optimizer.state


@pytest.mark.parametrize("make_optimizer", [SGD, functools.partial(SGD, momentum=0.9), Adam])
@pytest.mark.parametrize("missing", ["weight", "bias"])
def test_an_optimizer_that_does_not_know_a_parameter(backend, missing, make_optimizer):
    tensors = net()
    known = [p for p in parameters(tensors) if p is not tensors[missing][2]]
    optimizer = make_optimizer(known, lr=0.1)
    shape = r"\(2, 5\)" if missing == "weight" else r"\(2,\)"
    message = rf"optimizer: does not know a parameter of shape {shape}; its param_groups must hold the very tensors"
    assert_nothing_happens(tensors, ValueError, message, optimizer=optimizer)
    assert not optimizer.state_dict()["state"], "the optimizer's state has changed"


@pytest.mark.parametrize("make_optimizer", [functools.partial(SGD, momentum=0.9), Adam])
def test_a_label_out_of_range_leaves_the_optimizer_alone(backend, make_optimizer):
    tensors = net()
    tensors["target"][1] = 2
    optimizer = make_optimizer(parameters(tensors), lr=0.1)
    assert_nothing_happens(tensors, IndexError, r"value 2 at position 1 is out of range", optimizer=optimizer)
    assert not optimizer.state_dict()["state"], "the optimizer's state has changed"


def test_a_label_out_of_range_leaves_gradients_alone(backend):
    tensors = net()
    for p in parameters(tensors):
        p.grad = torch.full_like(p, 7.0)
    tensors["target"][1] = 2
    with pytest.raises(IndexError, match=r"value 2 at position 1 is out of range"):
        step(tensors)
    assert all(same(g, torch.full_like(g, 7.0)) for g in gradients(tensors))
