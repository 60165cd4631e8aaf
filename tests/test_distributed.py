"""DistributedNetwork against DecoupledNetwork: the same training by 2 to 4 processes and by one."""

from __future__ import annotations

import importlib.util
import re
import signal
from pathlib import Path

import distributed_jobs as jobs
import pytest
import ranks
import torch

pytestmark = pytest.mark.cpu

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.mark.parametrize(
    ("name", "n_layer", "n_data"),
    [
        ("mixed", 2, 1),
        ("mixed", 1, 2),
        ("mixed", 2, 2),
        ("linear", 3, 1),  # one layer each, so that the last rank stores nothing
        ("convolutions", 2, 1),  # with running statistics
    ],
)
def test_many_processes_train_like_one(tmp_path, name, n_layer, n_data):
    whole = jobs.train_alone(name, torch.float64)
    runs = ranks.run(jobs.train_together, n_layer * n_data, tmp_path / "job", name, torch.float64, n_layer, n_data)
    for run in runs:
        assert_same(run, whole)
    assert sorted(t for run in runs for t in run.z) == sorted(list(whole.z) * n_data)


def assert_same(run: jobs.Run, whole: jobs.Run) -> None:
    """In float64, to the order of sums: the curves and the net as a whole, and what the shard has of the values."""
    rows = slice(run.shard.start, run.shard.stop)
    z, multiplier = ({t: of_all[t][rows] for t in run.z} for of_all in (whole.z, whole.multiplier))
    expected = whole._replace(z=z, multiplier=multiplier)
    for field in ("energies", "residual_norm", "value_norm", "net", "z", "multiplier"):
        torch.testing.assert_close(getattr(run, field), getattr(expected, field), rtol=1e-10, atol=1e-10)


def test_loss_curve_in_float32(tmp_path):
    """It is no further from float64's than twice that of one process."""
    exact, plain = (jobs.train_alone("mixed", dtype).energies.double() for dtype in (torch.float64, torch.float32))
    runs = ranks.run(jobs.train_together, 4, tmp_path / "job", "mixed", torch.float32, 2, 2)
    allowed = 2 * (plain - exact).abs().amax(0) + torch.finfo(torch.float32).eps * exact.abs().amax(0)
    for run in runs:
        assert run.energies.dtype == torch.float32
        error = (run.energies - exact).abs().amax(0)
        assert (error <= allowed).all(), f"{error} > {allowed}"
    assert exact[-1, -1] < 0.9 * exact[0, -1], "the net has learnt nothing that could be compared"


def test_resume_on_another_mesh(tmp_path):
    """Four visits by 2 x 2 ranks, three by one, and the last three by 3 x 1: the run of one process."""
    whole, folder = jobs.train_alone("mixed", torch.float64), tmp_path / "checkpoints"
    begin = 0
    for visits, (n_layer, n_data) in ((4, (2, 2)), (3, (1, 1)), (3, (3, 1))):
        args = (folder, visits, "mixed", torch.float64, n_layer, n_data)
        runs = ranks.run(jobs.train_with_checkpoints, n_layer * n_data, tmp_path / f"job {begin}", *args)
        curves = [getattr(whole, name)[begin : begin + visits] for name in ("energies", "residual_norm", "value_norm")]
        for run in runs:
            for got, expected in zip(run[:3], curves, strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
        begin += visits
        assert [path.name for path in folder.iterdir()] == [f"step-{begin:09d}"]
    for run in runs:
        assert_same(
            run._replace(energies=whole.energies, residual_norm=whole.residual_norm, value_norm=whole.value_norm), whole
        )


def test_gradient_and_curvature_of_hidden_values(tmp_path):
    """For the modes of training, which call them. The power iterations begin with other directions and converge, to the
    sign of the last one: their difference quotients have a step of .01."""
    gradient, curvature = jobs.gradient_and_curvature_alone()
    for got, shard, its_curvature in ranks.run(jobs.gradient_and_curvature, 4, tmp_path / "job", 2, 2):
        expected = {t: gradient[t][shard.start : shard.stop] for t in got}
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
        assert its_curvature == pytest.approx(curvature, rel=1e-2)


def test_model_of_what_is_sent(tmp_path):
    """That of examples/weak_scaling.py, counted on both ranks of a boundary; beside it there are the logs."""
    spec = importlib.util.spec_from_file_location("weak_scaling", EXAMPLES / "weak_scaling.py")
    weak_scaling = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(weak_scaling)
    layers, width, samples, steps = 2, 5, 7, 3
    expected = weak_scaling.traffic(weak_scaling.Work(layers, width, samples, steps), 2, 2)

    lower, _, upper, _ = ranks.run(jobs.count_what_is_sent, 4, tmp_path / "job", 2, 2, width, layers, samples, steps)
    assert weak_scaling.FLOAT * (lower.to_neighbours + upper.to_neighbours) == expected.boundary_bytes
    gradients, logs = lower.to_sums
    assert logs == 3 * 2 * layers
    assert gradients == expected.gradient_bytes / weak_scaling.FLOAT + logs + 1  # of two ranks a ring sends all once


# ---------------------------------------------------------------------------------------------------------------------
# What goes wrong
# ---------------------------------------------------------------------------------------------------------------------


def test_a_dead_rank_ends_the_job(tmp_path):
    args = (jobs.die_in_training, 4, tmp_path / "job", 3, "mixed", torch.float64, 2, 2)
    *others, dead = ranks.run_to_any_end(*args, timeout=60)
    assert dead.exitcode == -signal.SIGKILL
    # ranks 1 and 2 had to do with it, as the block below and the other shard; rank 0 with the two
    expected = (r"ranks \[0, [12]\]|(to|from) rank 2", r"(to|from) rank 3|ranks \[1, 3\]", r"ranks \[2, 3\]")
    for rank, (ended, peer) in enumerate(zip(others, expected, strict=True)):
        assert ended.exitcode == 1
        assert re.search(rf"^rank {rank}: (sending|receiving|summing|taking) .*({peer}).* failed", ended.error)


@pytest.mark.parametrize(
    ("mesh", "operation"), [((2, 1), "receiving z_1 from rank 1"), ((1, 2), "summing the gradients over ranks [0, 1]")]
)
def test_timeout(tmp_path, mesh, operation):
    error, _ = ranks.run(jobs.let_wait, 2, tmp_path / "job", *mesh)
    assert error.startswith(f"rank 0: {operation} failed; is that rank dead or slower than the timeout?")


def test_bad_arguments(tmp_path):
    for rank, messages in enumerate(ranks.run(jobs.bad_arguments, 2, tmp_path / "job")):
        assert messages == [
            "n_layer, n_data: 3 x 1 ranks are 3, but there are 2",
            "n_layer: must be at least 1, got 0",
            "mesh: expected the dimensions ('layer', 'data'), got ('data', 'layer')",
            "mesh: has 2 blocks of layers, but net has 1 layers",
            "net: layer 1 of block 1 shares 0.weight with block 0; blocks have parameters of their own",
            f"z: has 2 tensors, but the block of layers {rank} to {2 * rank} has 1 hidden values",
            "z[0]: expected torch.float32, got torch.float64",
            f"z[0]: expected a contiguous tensor, got strides {(1, jobs.N)}",
            "step_size: must not be negative, got -0.1",
            "keep: must be at least 1, got 0",
        ]
