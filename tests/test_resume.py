"""lgd.fit goes on after a crash with the very numbers that it would have had, whenever the crash came."""

from __future__ import annotations

import random
from fractions import Fraction
from pathlib import Path

import killed
import killed_training
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

import lgd_kernels as lgd
from lgd_kernels.decoupled import (
    Backpropagation,
    Callback,
    Checkpoints,
    ReinitializedValues,
    StoredValues,
    files,
    residual_net,
)

pytestmark = pytest.mark.cpu  # a GPU's own numbers may differ from run to run

N, EPOCHS, BATCH_SIZE = 21, 3, 8
STEPS = EPOCHS * 3


def assert_same(ours, theirs, where="result"):
    """Equal bit for bit, whatever they are made of."""
    assert type(ours) is type(theirs), where
    if isinstance(ours, torch.Tensor):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), where
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            assert_same(ours[key], theirs[key], f"{where}[{key!r}]")
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs), where
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(a, b, f"{where}[{i}]")
    else:
        assert ours == theirs or (ours != ours and theirs != theirs), f"{where}: {ours} and {theirs}"


# ---------------------------------------------------------------------------------------------------------------------
# Killed processes
# ---------------------------------------------------------------------------------------------------------------------


def moments(n, seed):
    """Moments to kill a training at, at random: between any two steps, or at any place of the writing of a file."""
    generator = random.Random(seed)
    for _ in range(n):
        what = generator.choice(["step", "step", *killed.ON_FILES])
        most = {"step": 15, "write": 300}.get(what, 6)
        yield killed.Moment(what, generator.randint(1, most))


def test_a_training_killed_20_times_ends_with_the_same_bits(tmp_path):
    def folder(name):
        (tmp_path / name).mkdir()
        return tmp_path / name

    uninterrupted = folder("uninterrupted")
    killed.run(killed_training.run_training, uninterrupted)
    expected = files.load(uninterrupted / "result")
    assert len(expected["history"]["loss"]) == killed_training.EPOCHS

    n_killed, n_finished, present = 0, 0, folder("0")
    for moment in [*moments(60, seed=0), None]:
        if n_killed == 20:
            moment = None
        if killed.run(killed_training.run_training, present, kill_at=moment):
            n_killed += 1
            continue
        assert_same(files.load(present / "result"), expected)
        n_finished += 1
        present = folder(str(n_finished))
        if moment is None:
            break
    assert n_killed == 20 and n_finished >= 2


# ---------------------------------------------------------------------------------------------------------------------
# Every step, every mode
# ---------------------------------------------------------------------------------------------------------------------


class Noisy(Dataset):
    """Samples that are a little different every time, by torch's default generator."""

    def __init__(self):
        generator = torch.Generator("cpu").manual_seed(5)
        self.x = torch.randn(N, 6, generator=generator, device="cpu")

    def __len__(self):
        return N

    def __getitem__(self, index):
        x = self.x[index]
        return x + 0.1 * torch.randn(6, device="cpu"), x[:3].argmax()


def linear_net():
    return lgd.DecoupledNetwork(residual_net(6, 5, 3, 3))


def any_net():
    """With randomness and buffers of its own."""
    first = [nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.2)]
    return lgd.DecoupledNetwork([*first, nn.Linear(5, 5), nn.SiLU(), nn.Linear(5, 3)])


def adam(net):
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-2)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)


def sgd(net):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    return optimizer, torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)


def bfloat16_store():
    return lgd.ActivationStore(N, [(5,)] * 3, location="host", dtype=torch.bfloat16, rounding_seed=1)


RUNS = {
    "z and multipliers": (linear_net, adam, {"mode": StoredValues(burn_in=3)}),
    "z": (linear_net, sgd, {"mode": StoredValues(multipliers=False, burn_in=0, rho=lambda epoch: 0.1 * (1 + epoch))}),
    "any modules": (any_net, adam, {"mode": StoredValues(burn_in=3)}),
    "z in bfloat16": (linear_net, adam, {"mode": StoredValues(burn_in=3), "store": bfloat16_store}),
    "clipped": (any_net, sgd, {"mode": StoredValues(burn_in=3), "clip_grad_norm": 0.5}),
    "re-initialised": (any_net, adam, {"mode": ReinitializedValues(steps=3)}),
    "backpropagation": (any_net, sgd, {"mode": Backpropagation()}),
}


class Crash(Callback):
    """After so many minibatches of this process."""

    def __init__(self, after):
        self.left = after

    def on_batch_end(self, training):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1


class Keep(Callback):
    """The run itself, to look at its end."""

    def on_epoch_end(self, training):
        self.training = training


def start(run, folder, *callbacks, resume=True, **options):
    """A run from new objects, as a new process makes them; its end."""
    make_net, make_optimizer, of_run = RUNS[run]
    torch.manual_seed(3)
    net = make_net()
    optimizer, scheduler = make_optimizer(net)
    keep = Keep()
    of_run = {name: value() if name == "store" else value for name, value in of_run.items()}
    lgd.fit(
        net,
        Noisy(),
        **({"epochs": EPOCHS, "batch_size": BATCH_SIZE, "progress": False} | of_run | options),
        optimizer=optimizer,
        scheduler=scheduler,
        validation=Noisy(),
        callbacks=[keep, *callbacks],
        checkpoint=folder,
        resume=resume,
    )
    state = keep.training.state_dict()
    del state["seconds"], state["history"]["seconds"]
    return state


@pytest.mark.parametrize(
    ("run", "every"), [("z and multipliers", 1), ("any modules", None), *((run, 2) for run in RUNS)]
)
def test_a_run_that_crashes_at_any_step_ends_with_the_same_bits(run, every, tmp_path):
    expected = start(run, Checkpoints(tmp_path / "uninterrupted"))
    assert expected["position"] == (EPOCHS, 0, STEPS)
    for step in range(STEPS):
        checkpoints = Checkpoints(tmp_path / str(step), every=every)
        with pytest.raises(KeyboardInterrupt):
            start(run, checkpoints, Crash(after=step))
        per_save = every or STEPS // EPOCHS
        assert checkpoints.steps()[-1] == step // per_save * per_save
        assert_same(start(run, checkpoints), expected)


def fit_again(run, folder, *callbacks, **options):
    """The history of a resumed run."""
    make_net, make_optimizer, of_run = RUNS[run]
    net = make_net()
    optimizer, scheduler = make_optimizer(net)
    given = {"epochs": EPOCHS, "batch_size": BATCH_SIZE, "scheduler": scheduler, "progress": False}
    options = given | {"checkpoint": folder, "resume": True, "callbacks": callbacks} | of_run | options
    return lgd.fit(net, Noisy(), optimizer=optimizer, **options)


def test_a_finished_run_is_only_looked_at(tmp_path):
    class Never(Callback):
        def on_batch_end(self, training):
            raise AssertionError("a step was made")

    expected = start("z and multipliers", tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    history = fit_again("z and multipliers", tmp_path, Never())
    assert history.loss == expected["history"]["loss"]
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_a_checkpoint_is_not_kept_open(tmp_path):
    """Or the space of the removed ones would not be free on the disk until the end."""

    class Maps(Callback):
        def on_batch_end(self, training):
            mapped = Path("/proc/self/maps").read_text()
            assert "libc" in mapped and str(tmp_path) not in mapped

    start("z and multipliers", tmp_path, epochs=1)
    start("z and multipliers", tmp_path, Maps())


def test_more_epochs_are_added_to_a_finished_run(tmp_path):
    expected = start("backpropagation", tmp_path / "longer", epochs=EPOCHS + 2)
    start("backpropagation", tmp_path / "shorter")
    assert_same(start("backpropagation", tmp_path / "shorter", epochs=EPOCHS + 2), expected)


# ---------------------------------------------------------------------------------------------------------------------
# The folder of checkpoints
# ---------------------------------------------------------------------------------------------------------------------


class Steps(Callback):
    """The checkpoints that are there after every minibatch."""

    def __init__(self, checkpoints):
        self.checkpoints, self.seen = checkpoints, []

    def on_batch_end(self, training):
        self.seen.append(self.checkpoints.steps())


def test_the_last_ones_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path / "a" / "b", every=2, keep=3)
    steps = Steps(checkpoints)
    start("z", checkpoints, steps)
    assert steps.seen == [[0], [0], [0, 2], [0, 2], [0, 2, 4], [0, 2, 4], [2, 4, 6], [2, 4, 6], [4, 6, 8]]
    assert checkpoints.steps() == [6, 8, 9]  # and one at the end
    names = sorted(path.name for path in checkpoints.folder.iterdir())
    assert names == ["checkpoint-000000006.pt", "checkpoint-000000008.pt", "checkpoint-000000009.pt"]
    once_per_epoch = Checkpoints(tmp_path / "c")
    start("z", once_per_epoch)
    assert once_per_epoch.steps() == [6, 9]


def test_a_damaged_checkpoint_is_passed_over(tmp_path):
    expected = start("z and multipliers", tmp_path / "uninterrupted")
    checkpoints = Checkpoints(tmp_path / "damaged", every=2)
    with pytest.raises(KeyboardInterrupt):
        start("z and multipliers", checkpoints, Crash(after=5))
    assert checkpoints.steps() == [2, 4]
    path = checkpoints.folder / "checkpoint-000000004.pt"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.warns(UserWarning, match=r"000000004\.pt: is cut short .*; the checkpoint before it is taken"):
        assert_same(start("z and multipliers", checkpoints), expected)
    assert checkpoints.steps() == [8, 9]


def test_the_last_intact_one_is_never_removed_for_a_damaged_one(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    for step in (3, 7):
        (tmp_path / f"checkpoint-{step:09d}.pt").write_bytes(b"damaged")
    checkpoints.save(5, {"step": 5})
    assert checkpoints.steps() == [5]
    assert checkpoints.load() == {"step": 5}


def test_what_is_being_written_is_not_picked_up(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.load() is None
    checkpoints.save(1, {"step": 1})
    (tmp_path / "checkpoint-000000002.pt.partial").write_bytes((tmp_path / "checkpoint-000000001.pt").read_bytes())
    (tmp_path / "checkpoint-best.pt").write_bytes(b"somebody else's")
    assert checkpoints.steps() == [1] and checkpoints.load() == {"step": 1}


class Rate:
    """A learning rate with a state that is no plain container."""

    def __init__(self):
        self.of = Fraction(1, 2)

    def __call__(self, epoch):
        return float(self.of)


def test_what_could_not_be_loaded_is_told_before_the_first_step(tmp_path):
    net = linear_net()
    optimizer = torch.optim.Adam(net.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, Rate())
    with pytest.raises(TypeError, match=r"checkpoint-000000000\.pt: holds something other than tensors and plain"):
        lgd.fit(net, Noisy(), epochs=1, optimizer=optimizer, scheduler=scheduler, checkpoint=tmp_path, progress=False)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 7}, "batch_size: the checkpoint has 8, this run has 7"),
        ({"seed": 1}, "seed: the checkpoint has 0, this run has 1"),
        ({"scheduler": None}, "scheduler: the checkpoint has one, this run has None"),
        ({"mode": Backpropagation()}, "store: the checkpoint has one, this run has None"),
        ({"mode": StoredValues(multipliers=False)}, "multiplier: the saved store has True, this one has False"),
        ({"resume": False}, r"checkpoint: .* has a checkpoint of step 3 already; pass resume=True to go on from it"),
    ],
)
def test_a_run_of_another_kind_is_not_resumed(options, message, tmp_path):
    start("z and multipliers", tmp_path, epochs=1)
    with pytest.raises(ValueError, match=message):
        fit_again("z and multipliers", tmp_path, **options)


@pytest.mark.parametrize(("option", "value"), [("every", 0), ("keep", 0), ("keep", -2)])
def test_refused_checkpoints(option, value, tmp_path):
    with pytest.raises(ValueError, match=f"{option}: must be at least 1, got {value}"):
        Checkpoints(tmp_path, **{option: value})
    with pytest.raises(TypeError, match=f"{option}: expected an int, got float 2.5"):
        Checkpoints(tmp_path, **{option: 2.5})
