"""Tiles of operands by descriptors and by pointers, in Triton's interpreter.

Not collected by itself: test_triton_layers.py starts a process for it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from interpreted_layers import SMALL, linear_arguments, run_linear, visit
from step_nets import IN_PLACE, clone, listed, make
from triton.tools.tensor_descriptor import TensorDescriptor

from lgd_kernels.triton_kernels import decoupled_linear as linear_kernels
from lgd_kernels.triton_kernels import layers, linear_launches

pytestmark = pytest.mark.usefixtures("nan_prefill")
TILES = replace(SMALL, parts=1)
zeros = partial(torch.zeros, dtype=torch.bfloat16)


@pytest.fixture
def used(monkeypatch):
    """The number of descriptors of every launch of a product; tiles are small."""
    use_tiles(TILES, monkeypatch)
    counts, launch = [], linear_launches.launch

    def counted(kernel, grid, like, *args, **options):
        if "BLOCK_K" in options:
            counts.append(sum(isinstance(x, TensorDescriptor) for x in args))
        launch(kernel, grid, like, *args, **options)

    monkeypatch.setattr(linear_launches, "launch", counted)
    return counts


def use_tiles(tiles, monkeypatch):
    monkeypatch.setattr(linear_launches, "linear_tiles", lambda *_: tiles)


@pytest.mark.parametrize(
    ("preactivation", "dtypes"),
    [(False, (torch.bfloat16, None)), (True, (torch.float16, None)), (True, (torch.float32, torch.bfloat16))],
    ids=["bfloat16", "float16", "autocast"],
)
def test_descriptors_equal_pointers_bit_for_bit(dtypes, preactivation, used, monkeypatch):
    """In tiles of which the last ones end beyond a layer, where the next one starts."""
    lists, activation, numbers = linear_arguments((2, 20, 24, 8), *dtypes)
    arguments = (lists, [7] * len(activation), numbers, preactivation)
    by_descriptors = run_linear(linear_kernels, *arguments)
    assert used == [2, 2, 2]
    use_tiles(replace(TILES, descriptors=False), monkeypatch)
    by_pointers = run_linear(linear_kernels, *arguments)
    assert used == [2, 2, 2, 0, 0, 0]
    assert all(map(torch.equal, by_descriptors, by_pointers))


def test_a_visit_by_descriptors(used, monkeypatch):
    """x lies in memory of its own: where it is among the inputs of a launch, these have no descriptor."""
    net = make((8,) * 4, n=20, dtype=torch.bfloat16, velocity=True, stacked=True)
    nets = (net, clone(net))
    energy = visit(nets[0], preactivation=False)
    assert set(used) == {1, 2}
    use_tiles(replace(TILES, descriptors=False), monkeypatch)
    used.clear()
    assert torch.equal(visit(nets[1], preactivation=False), energy) and set(used) == {0}
    for name in IN_PLACE:
        assert all(map(torch.equal, *(listed(net[name]) for net in nets)))


def descriptor(stack, chosen):
    return linear_launches.tile_descriptor(layers.LayerList([stack]).operand(chosen), 64, 32)


def test_what_descriptors_describe():
    stack = zeros(7, 9, 24)
    found = descriptor(stack[..., 8:], (1, 3, 5))
    assert found.base.data_ptr() == stack[1, 0, 8:].data_ptr()
    assert (found.shape, found.strides) == ([3, 9, 16], [2 * 9 * 24, 24, 1])
    assert found.block_shape == [1, 64, 32]
    one = torch.empty_strided((1, 9, 8), (300, 8, 1), dtype=torch.bfloat16)
    assert descriptor(one, (0,)).strides == [9 * 8, 8, 1]  # whatever the stride of the one layer is


@pytest.mark.parametrize(
    ("stack", "chosen"),
    [
        (zeros(7, 9, 16), (0, 1, 3)),
        (zeros(7, 9, 16), (3, 2)),
        (zeros(7, 16, 16).mT, (0, 1)),
        (zeros(7, 1, 16).mT, (0, 1)),
        (zeros(7, 9, 32)[..., ::2], (0, 1)),
        (zeros(7, 9, 24)[..., 4:20], (0, 1)),
        (zeros(7, 9, 15), (0, 1)),
        (zeros(7, 1, 16).expand(7, 9, 16), (0, 1)),
        (zeros(1, 9, 16).expand(7, 9, 16), (0, 1)),
        (zeros(9, 7, 16).transpose(0, 1), (0, 1)),
        (torch.empty_strided((2, 9, 16), (9 * 24 + 8, 24, 1), dtype=torch.bfloat16), (0, 1)),
        (zeros(7, 0, 16), (0, 1)),
    ],
    ids=(
        *("irregular", "backwards", "columns", "one_column", "every_other", "start", "odd", "one_row", "one_layer"),
        *("interleaved", "apart_by_no_rows", "empty"),
    ),
)
def test_what_has_no_descriptors(stack, chosen):
    assert descriptor(stack, chosen) is None
