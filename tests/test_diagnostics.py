"""lgd.diagnostics: every measurement against the long way to it."""

from __future__ import annotations

import matplotlib
import pytest
import torch
from plain_network import adjoint, random_batch
from sklearn.datasets import load_digits
from small_networks import NETS, make
from torch import nn
from torch.nn.functional import cosine_similarity, cross_entropy

import lgd_kernels as lgd
from lgd_kernels.decoupled import EpochNumbers, ReinitializedValues, residual_net
from lgd_kernels.diagnostics import (
    compare_with_backpropagation,
    diagnose,
    feed_forward_gap,
    plot_diagnostics,
    sample_gradient_norms,
)

by_net = pytest.mark.parametrize("name", NETS)


def point(name):
    """(net, arguments, options) in float64, at random hidden values."""
    net, x, labels = make(name)
    batch = random_batch(net.double(), x.double(), labels)
    return net, batch[:3], {"multiplier": batch.multiplier, "rho": 0.7}


@by_net
def test_comparison_with_backpropagation(name):
    net, given, options = point(name)
    got = compare_with_backpropagation(net, *given, **options)
    net.local_gradient_(*given, **options)
    local = [torch.cat([p.grad.flatten() for p in layer.parameters()]) for layer in net.layers]
    net.zero_grad()
    cross_entropy(net(given[0]), given[2]).backward()
    other = [torch.cat([p.grad.flatten() for p in layer.parameters()]) for layer in net.layers]
    cosines = [cosine_similarity(a, b, dim=0) for a, b in zip(local, other, strict=True)]
    torch.testing.assert_close(got.cosine, torch.stack(cosines))
    torch.testing.assert_close(
        got.norm_ratio, torch.stack([a.norm() / b.norm() for a, b in zip(local, other, strict=True)])
    )
    assert all(got.cosine.abs() < 0.99)  # or anything would do


@by_net
def test_at_the_adjoint_nothing_differs_from_backpropagation(name):
    net, (x, _, labels), _ = point(name)
    batch, _ = adjoint(net, x, labels, nn.CrossEntropyLoss(reduction="sum"))
    got = diagnose(net, *batch[:3], multiplier=batch.multiplier)
    ones = torch.ones(len(net.layers), dtype=torch.float64)
    torch.testing.assert_close(got.gradient.cosine, ones)
    torch.testing.assert_close(got.gradient.norm_ratio, ones)
    assert got.gap.eq(0).all() and got.residual.max() < 1e-14
    assert got.energy[:-1].abs().max() < 1e-14
    torch.testing.assert_close(got.energy[-1], cross_entropy(net(x), labels))


def test_layers_without_gradients_are_not_compared():
    net = lgd.DecoupledNetwork([nn.Linear(4, 4), nn.Sequential(nn.Tanh()), nn.Linear(4, 3)])
    net.layers[2].requires_grad_(False)
    x, labels = torch.randn(5, 4), torch.randint(3, (5,))
    got = compare_with_backpropagation(net, x, [torch.randn(5, 4), torch.randn(5, 4)], labels)
    assert got.cosine.isnan().tolist() == got.norm_ratio.isnan().tolist() == [False, True, True]


@by_net
def test_gap_and_residual(name):
    net, (x, z, labels), options = point(name)
    got, values = diagnose(net, x, z, labels, **options), net.hidden_values(x)
    expected = [(mine - fed).norm() / fed.norm() for mine, fed in zip(z, values, strict=True)]
    torch.testing.assert_close(got.gap, torch.stack(expected))
    assert torch.equal(feed_forward_gap(net, x, z), got.gap)
    inputs = [x, *z[:-1]]
    predictions = [layer(value) for layer, value in zip(net.layers[:-1], inputs, strict=True)]
    expected = [(mine - made).norm() / mine.norm() for mine, made in zip(z, predictions, strict=True)]
    torch.testing.assert_close(got.residual, torch.stack(expected).detach())


@by_net
def test_norms_of_the_gradients_of_samples(name):
    net, (x, z, labels), options = point(name)
    got = sample_gradient_norms(net, x, z, labels, **options)
    known = {"linear": 3, "residual": 5, "convolutions": 3, "mixed": 4}[name]
    assert got.weight.shape == got.bias.shape == (len(net.layers), len(x))
    layers = got.weight.isfinite().all(1).nonzero().flatten().tolist()
    assert layers == {"convolutions": [2]}.get(name, list(range(known)))
    assert got.weight.isnan().any(1).sum() == got.bias.isnan().any(1).sum() == len(net.layers) - len(layers)
    for i in range(len(x)):
        lambdas = [value[i : i + 1] for value in options["multiplier"]]
        sample = (x[i : i + 1], [value[i : i + 1] for value in z], labels[i : i + 1])
        net.local_gradient_(*sample, multiplier=lambdas, rho=options["rho"])
        for t in layers:
            weight, bias = net.layers[t].parameters()
            torch.testing.assert_close(got.weight[t, i], weight.grad.norm())
            torch.testing.assert_close(got.bias[t, i], bias.grad.norm())


def test_a_bias_that_is_not_there_has_no_gradient():
    net = lgd.DecoupledNetwork([nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 3)])
    got = sample_gradient_norms(net, torch.randn(5, 4), [torch.randn(5, 4)], torch.randint(3, (5,)))
    assert got.bias[0].eq(0).all() and got.bias[1].gt(0).all() and got.weight.gt(0).all()


def test_nothing_changes():
    net, (x, z, labels), options = point("convolutions")
    net.train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    kept = [value.clone() for value in (*z, *options["multiplier"])]
    diagnose(net, x, z, labels, **options)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(map(torch.equal, kept, (*z, *options["multiplier"])))
    assert all(p.grad is None for p in net.parameters())


def test_reinitialized_values_have_backpropagations_gradients_in_a_deep_net():
    """31 hidden values of width 64, at initialisation: accuracy on easy data would not show what this shows."""
    pixels, labels = load_digits(return_X_y=True)
    x, labels = torch.as_tensor(pixels[:256], dtype=torch.float32), torch.as_tensor(labels[:256])
    x = (x - x.mean()) / x.std()
    net = lgd.DecoupledNetwork(residual_net(64, 64, 31, 10))
    mode = ReinitializedValues()
    numbers = mode.start_epoch(net, 0, x, labels, None, None)
    assert numbers[:2] == EpochNumbers(rho=1.0, dual_step=1.0)[:2]
    mode.visit_(net, x, labels, None, None, None, numbers)
    local = [torch.cat([p.grad.flatten() for p in layer.parameters()]) for layer in net.layers]
    net.zero_grad()
    net.loss(x, labels).backward()
    other = [torch.cat([p.grad.flatten() for p in layer.parameters()]) for layer in net.layers]
    cosines = [cosine_similarity(a, b, dim=0).item() for a, b in zip(local, other, strict=True)]
    ratios = [(a.norm() / b.norm()).item() for a, b in zip(local, other, strict=True)]
    assert min(cosines) >= 0.95
    assert min(ratios) >= 0.5 and max(ratios) <= 2


# ---------------------------------------------------------------------------------------------------------------------
# The picture
# ---------------------------------------------------------------------------------------------------------------------


def test_plot_shows_what_was_measured():
    net, given, options = point("residual")
    first, second = diagnose(net, *given, **options), diagnose(net, *given)
    axes = plot_diagnostics({"with": first, "without": second}).axes
    drawn = [[line.get_ydata() for line in ax.lines if line.get_label() in ("with", "without")] for ax in axes]
    together = [(s.sample_gradient_norms.weight**2 + s.sample_gradient_norms.bias**2).sqrt() for s in (first, second)]
    measured = [
        *([s.energy for s in (first, second)], [100 * s.residual for s in (first, second)]),
        *([100 * s.gap for s in (first, second)], [s.gradient.cosine for s in (first, second)]),
        *([s.gradient.norm_ratio for s in (first, second)], [norms.quantile(0.5, dim=1) for norms in together]),
    ]
    for lines, values in zip(drawn, measured, strict=True):
        for line, value in zip(lines, values, strict=True):
            torch.testing.assert_close(torch.as_tensor(line), value)


@pytest.mark.parametrize("name", ["linear", "convolutions"])
def test_plot_of_one_state(tmp_path, name):
    net, given, options = point(name)
    figure = plot_diagnostics(diagnose(net, *given, **options))
    assert isinstance(figure, matplotlib.figure.Figure) and figure.legends == []
    figure.savefig(tmp_path / "diagnostics.png")
    assert (tmp_path / "diagnostics.png").stat().st_size > 10_000
