"""lgd.fit: the training loop. That it goes on after a crash is in test_resume.py."""

from __future__ import annotations

import csv
import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, WeightedRandomSampler

import lgd_kernels as lgd
from lgd_kernels.decoupled import (
    Backpropagation,
    Callback,
    EpochNumbers,
    History,
    Mode,
    ReinitializedValues,
    StoredValues,
    residual_net,
)
from lgd_kernels.decoupled.data import Batches
from lgd_kernels.decoupled.history import EpochSums

N, D, CLASSES, WIDTH = 90, 6, 3, 8
MODES = {
    "z and multipliers": StoredValues(),
    "z": StoredValues(multipliers=False),
    "re-initialised": ReinitializedValues(),
    "backpropagation": Backpropagation(),
}


def samples(n=N, seed=0):
    """(x, labels): which of the first inputs is the largest."""
    generator = torch.Generator("cpu").manual_seed(seed)
    x = torch.randn(n, D, generator=generator, device="cpu").to(torch.get_default_device())
    return x, x[:, :CLASSES].argmax(1)


def make_net(seed=0, **options):
    torch.manual_seed(seed)
    return lgd.DecoupledNetwork(residual_net(D, WIDTH, 3, CLASSES), **options)


def fit(net, data, epochs=2, *, lr=3e-2, **options):
    """With Adam, unless there is an optimizer, without a bar, and with a short burn-in."""
    options.setdefault("optimizer", torch.optim.Adam(net.parameters(), lr=lr))
    return lgd.fit(net, data, epochs=epochs, **({"progress": False, "mode": StoredValues(burn_in=4)} | options))


def numbers(history):
    """Without the seconds, which are never the same."""
    return {name: column for name, column in history.state_dict().items() if name != "seconds"}


def assert_same_nets(ours, theirs):
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_learns(mode):
    net = make_net()
    history = fit(net, samples(), 15, mode=MODES[mode], validation=samples(seed=1), batch_size=30)
    assert history.validation_accuracy[-1] > 0.7  # a third by guessing
    assert history.validation_loss[-1] < history.validation_loss[0]
    assert len(history) == 15 and all(len(column) == 15 for column in history.state_dict().values())
    assert all(len(residual) == 3 for residual in history.residual)
    assert net.training


def test_it_is_the_loop_that_one_would_write():
    """Plain tensors instead of a store, and the order of the samples as documented."""
    x, labels = samples()
    history, net = fit(net := make_net(), (x, labels), 3, batch_size=40, seed=7), net
    plain, mode = make_net(), StoredValues(burn_in=4)  # two visits of a minibatch in a row
    optimizer = torch.optim.Adam(plain.parameters(), lr=3e-2)
    z = plain.hidden_values(x)
    multiplier = [torch.zeros_like(value) for value in z]
    batches = Batches((x, labels), 40, seed=7)

    def rows(indices):
        return x[indices], labels[indices], [v[indices] for v in z], [v[indices] for v in multiplier]

    def put_back(indices, of_z, of_multiplier):
        for stored, moved in zip([*z, *multiplier], [*of_z, *of_multiplier], strict=True):
            stored[indices] = moved

    chunks = torch.arange(N, device=x.device).split(30)  # 3 of them, as small as 3 of at most 40 can be
    at_start = mode.start_epoch(plain, 0, *rows(chunks[0]))
    for chunk in chunks:
        of_chunk = rows(chunk)
        mode.burn_in_(plain, *of_chunk, at_start)
        put_back(chunk, *of_chunk[2:])
    for epoch in range(3):
        loss = 0.0
        for i, indices in enumerate(batches.of_epoch(epoch)):
            indices = indices.to(x.device)
            of_batch = rows(indices)
            if i == 0:
                of_epoch = mode.start_epoch(plain, epoch, *of_batch)
            for _ in range(2):
                loss += float(mode.visit_(plain, *of_batch, optimizer, of_epoch).energies[-1])
            put_back(indices, *of_batch[2:])
        assert history.step_size[epoch] == of_epoch.step_size
        assert history.loss[epoch] == pytest.approx(loss / (2 * N), rel=1e-12)  # the same numbers, added in float64
    assert_same_nets(net, plain)


class OneStep(Mode):
    """What a user may write, without more than there must be."""

    keeps_values = True

    def start_epoch(self, net, epoch, x, target, z, multiplier):
        return EpochNumbers(rho=0.1, step_size=1.0)

    def visit_(self, net, x, target, z, multiplier, optimizer, numbers):
        return net.visit_(x, z, target, step_size=numbers.step_size, rho=numbers.rho, optimizer=optimizer)


def test_a_mode_of_ones_own():
    net, data = make_net(), samples()
    history = fit(net, data, 15, mode=OneStep(), validation=data)
    assert history.validation_loss[-1] < 0.8 * history.validation_loss[0] and history.step_size == [1.0] * 15


def test_the_history_tells_what_happened():
    net, data = make_net(), samples()
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
    mode = StoredValues(rho=lambda epoch: 0.05 * (1 + epoch), burn_in=0)
    history = fit(net, data, 3, optimizer=optimizer, scheduler=scheduler, mode=mode, validation=data)
    assert history.learning_rate == pytest.approx([0.015 * (1 + math.cos(math.pi * i / 4)) for i in range(3)])
    assert history.rho == pytest.approx([0.05, 0.1, 0.15])
    net.eval()
    with torch.no_grad():
        loss = nn.functional.cross_entropy(net(data[0]), data[1])
        accuracy = (net(data[0]).argmax(1) == data[1]).double().mean()
    assert history.validation_loss[-1] == pytest.approx(float(loss), rel=1e-6)
    assert history.validation_accuracy[-1] == pytest.approx(float(accuracy))
    assert all(0 < value < 1 for residual in history.residual for value in residual)
    assert all(energy > loss > 0 for energy, loss in zip(history.energy, history.loss, strict=True))
    assert all(seconds > 0 for seconds in history.seconds)
    lines = str(history).splitlines()
    assert len(lines) == 4 and "validation accuracy" in lines[0] and lines[-1].split()[0] == "2"


def test_means_over_an_epoch():
    """Of two visits of a net with two layers, of 2 and 3 samples."""
    sums = EpochSums.zero(2, torch.get_default_device())
    for n, energies, residual, value in ((2, [1.0, 2.0], [3.0], [6.0]), (3, [-2.0, 4.5], [4.0], [8.0])):
        sums.add_(n, torch.tensor(energies), torch.tensor(residual), torch.tensor(value))
    assert sums.means() == {"loss": 6.5 / 5, "energy": 5.5 / 5, "residual": [0.5]}


def test_ignored_labels_do_not_count_in_the_accuracy():
    x, labels = samples()
    labels[::2] = 2  # a class, so that the net may answer it
    net = make_net(ignore_index=2)
    history = fit(net, (x, labels), 1, validation=(x, labels), lr=0.0)
    with torch.no_grad():
        answers = net(x).argmax(1)
    assert ((answers == 2) & (labels == 2)).any()
    right = (answers == labels)[labels != 2].double().mean()
    assert history.validation_accuracy == [pytest.approx(float(right))]


def test_regression_has_no_accuracy():
    x, _ = samples()
    net = lgd.DecoupledNetwork([nn.Linear(D, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 2)], head="squared")
    target = torch.stack([x.sum(1), x.prod(1)], 1)
    history = fit(net, (x, target), 2, validation=(x, target))
    assert all(math.isnan(value) for value in history.validation_accuracy)
    net.eval()
    with torch.no_grad():
        assert history.validation_loss[-1] == pytest.approx(float(0.5 * (net(x) - target).square().sum() / N), rel=1e-6)


def test_validation_does_not_touch_the_training():
    class Judged(Callback):
        def on_epoch_end(self, training):
            assert training.net.training

    def chain():
        torch.manual_seed(0)
        return lgd.DecoupledNetwork([nn.Linear(D, WIDTH), nn.BatchNorm1d(WIDTH), nn.Dropout(0.3), nn.Linear(WIDTH, 3)])

    torch.manual_seed(1)
    fit(with_validation := chain(), samples(), validation=samples(seed=2), callbacks=[Judged()])
    torch.manual_seed(1)
    fit(without := chain(), samples())
    assert_same_nets(with_validation, without)


@pytest.mark.parametrize("convolution", [False, True])
def test_gradients_are_clipped(convolution):
    x, labels = samples()
    net = make_net()
    if convolution:
        x, net = x.unsqueeze(1), lgd.DecoupledNetwork([nn.Conv1d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3)])
    before = [p.detach().clone() for p in net.parameters()]
    mode = StoredValues(visits=1, burn_in=4)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    fit(net, (x, labels), 1, optimizer=optimizer, mode=mode, clip_grad_norm=1e-3, batch_size=N)
    change = torch.stack([(p.detach() - b).norm() for p, b in zip(net.parameters(), before, strict=True)]).norm()
    # a step of one epoch; clip_grad_norm_ adds 1e-6 to the norm, and weights of up to 4 are rounded to 2**-22
    n_numbers = sum(b.numel() for b in before)
    assert abs(float(change) - 1e-3) < 1e-3 * 1e-2 + n_numbers**0.5 * 2.0**-22


def test_clipping_at_a_large_norm_changes_nothing():
    """But for the rounding of a step that is not fused."""
    fit(clipped := make_net(), samples(), 1, clip_grad_norm=1e9, batch_size=N, lr=1e-3)
    fit(fused := make_net(), samples(), 1, batch_size=N, lr=1e-3)
    start = make_net()
    for a, b, p in zip(clipped.parameters(), fused.parameters(), start.parameters(), strict=True):
        step = (b - p).detach().abs().max()
        torch.testing.assert_close(a, b, rtol=2.0**-22, atol=float(step) * 1e-5)


class Seen(nn.Module):
    """Tells in which dtype it is called while the net trains."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def forward(self, x):
        if torch.is_autocast_enabled(x.device.type):
            self.dtypes.add(x.dtype)
        return x


@pytest.mark.parametrize("autocast", [True, False])
def test_mixed_precision(autocast):
    x, labels = samples()
    seen = Seen()
    net = lgd.DecoupledNetwork([nn.Conv1d(1, 4, 3, padding=1), seen, nn.ReLU(), nn.Flatten(), nn.Linear(4 * D, 3)])
    store = lgd.ActivationStore(N, [(4 * D,)])
    data = x.unsqueeze(1), labels
    history = fit(net, data, 15, autocast=autocast, store=store, validation=data)
    assert seen.dtypes == ({torch.bfloat16} if autocast else set())
    assert all(p.dtype == torch.float32 for p in net.parameters())
    assert history.validation_accuracy[-1] > 0.7


# ---------------------------------------------------------------------------------------------------------------------
# Where hidden values are kept
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("location", ["device", "host", "disk"])
def test_the_place_of_the_store_changes_nothing(location, tmp_path):
    expected = fit(plain := make_net(), samples(), validation=samples(), batch_size=25)
    path = tmp_path / "map" if location == "disk" else None
    store = lgd.ActivationStore(N, [(WIDTH,)] * 3, location=location, path=path)
    batch = store.gather(torch.arange(N, device="cpu"))
    for layer in (*batch.z, *batch.multiplier):
        layer.fill_(math.nan)  # what was there is overwritten
    store.scatter(batch)
    history = fit(net := make_net(), samples(), validation=samples(), batch_size=25, store=store)
    assert numbers(history) == numbers(expected)
    assert_same_nets(net, plain)
    assert all(value.isfinite().all() and value.any() for value in [*store.z, *store.multiplier])


def test_values_in_bfloat16():
    store = lgd.ActivationStore(N, [(WIDTH,)] * 3, dtype=torch.bfloat16, rounding_seed=0)
    history = fit(make_net(), samples(), 15, batch_size=30, store=store, validation=samples(seed=1))
    assert history.validation_accuracy[-1] > 0.7


def test_nets_in_float64():
    net = make_net().double()
    x, labels = samples()
    history = fit(net, (x.double(), labels), 1, batch_size=N)
    assert history.loss[0] > 0 and all(p.dtype == torch.float64 for p in net.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_tensors_datasets_and_loaders_are_the_same_data(workers):
    data = samples()
    expected = numbers(fit(make_net(), data, batch_size=32))
    if workers == 0:
        assert numbers(fit(make_net(), TensorDataset(*data), batch_size=32)) == expected
    loader = DataLoader(TensorDataset(*(part.cpu() for part in data)), 32, shuffle=True, num_workers=workers)
    assert numbers(fit(make_net(), loader, validation=None)) == expected


def test_loaders_keep_their_options():
    def collate(pairs):
        x, labels = zip(*pairs, strict=True)
        return 2 * torch.stack(x), torch.stack(labels)

    data = TensorDataset(*samples())
    kept = Batches(DataLoader(data, 40, drop_last=True, collate_fn=collate), None, seed=0)
    assert len(kept) == 2
    assert [batch.tolist() for batch in kept.of_epoch(5)] == [list(range(40)), list(range(40, 80))]
    (x, labels), _ = kept.load(kept.of_epoch(5), data.tensors[0].device)
    assert torch.equal(x, 2 * data.tensors[0][:40]) and torch.equal(labels, data.tensors[1][:40])
    assert [len(batch) for batch in kept.in_order()] == [30, 30, 30]


def test_every_epoch_of_every_seed_has_an_order_of_its_own():
    batches = {seed: Batches(samples(), 32, seed=seed) for seed in (0, 1, 2**32)}
    orders = [(seed, epoch, torch.cat(batches[seed].of_epoch(epoch))) for seed in batches for epoch in range(3)]
    for seed, epoch, order in orders:
        assert torch.equal(order.sort().values, torch.arange(N, device="cpu"))
        assert torch.equal(order, torch.cat(Batches(samples(), 32, seed=seed).of_epoch(epoch)))
    assert len({tuple(order.tolist()) for *_, order in orders}) == len(orders)
    assert [len(batch) for batch in batches[0].of_epoch(0)] == [32, 32, 26]


def test_normalisation_with_a_sample_left_over():
    x, labels = samples(33)
    net = lgd.DecoupledNetwork([nn.Linear(D, WIDTH), nn.BatchNorm1d(WIDTH), nn.Tanh(), nn.Linear(WIDTH, CLASSES)])
    history = fit(net, DataLoader(TensorDataset(x, labels), 16, shuffle=True, drop_last=True))
    assert all(math.isfinite(loss) for loss in history.loss)


class Wrong(Dataset):
    """Gives something else than pairs."""

    def __init__(self, item):
        self.item = item

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return self.item


class Stream(IterableDataset):
    def __iter__(self):
        return iter(())


def loader(**options):
    return DataLoader(TensorDataset(*samples()), **options)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (3, TypeError, r"data: expected \(x, target\), a Dataset with indices and a length, or a DataLoader .*got int"),
        (Stream(), TypeError, "data: expected .* every sample has hidden values of its own; got Stream"),
        (DataLoader(Stream(), 2), ValueError, "data: expected a DataLoader made with batch_size and shuffle"),
        (samples()[:1], TypeError, r"data: expected two tensors \(x, target\), got \(Tensor\)"),
        ((samples()[0], [1, 2]), TypeError, r"data: expected two tensors \(x, target\), got \(Tensor, list\)"),
        ((samples()[0], samples(80)[1]), ValueError, "data: x has 90 rows, but target has 80"),
        (samples(0), ValueError, "data: its 0 samples make no minibatch of 64"),
        (loader(batch_size=91, drop_last=True), ValueError, "data: its 90 samples make no minibatch of 91"),
        (loader(batch_size=None), ValueError, "got one with batch_size=None and a SequentialSampler"),
        (
            loader(batch_size=4, sampler=WeightedRandomSampler([1.0] * N, N)),
            ValueError,
            "got one with batch_size=4 and a WeightedRandomSampler",
        ),
        (Wrong(1.0), TypeError, r"data: expected minibatches \(x, target\) of tensors, got Tensor"),
        (Wrong((1.0, 2, 3)), TypeError, r"got list|got \(Tensor, Tensor, Tensor\)"),
        (Wrong((1.0, "a")), TypeError, r"data: expected minibatches .*, got \(Tensor, (list|tuple)\)"),
    ],
)
def test_refused_data(data, error, message):
    with pytest.raises(error, match=message):
        fit(make_net(), data)


def test_a_loader_has_its_own_batch_size():
    with pytest.raises(ValueError, match=r"batch_size: the DataLoader has its own \(32\), got 16"):
        fit(make_net(), loader(batch_size=32), batch_size=16)


def test_a_collate_function_must_keep_the_samples():
    half = loader(batch_size=32, collate_fn=lambda pairs: (torch.zeros(16, D), torch.zeros(16, dtype=torch.int64)))
    with pytest.raises(ValueError, match=r"data: a minibatch of 30 samples has shapes \(16, 6\) and \(16,\)"):
        fit(make_net(), half)


# ---------------------------------------------------------------------------------------------------------------------
# When it ends, and what it tells
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patience", [1, 3])
def test_it_stops_when_nothing_gets_better(patience):
    history = fit(make_net(), samples(), 20, lr=0.0, validation=samples(seed=1), patience=patience)
    assert len(history) == 1 + patience  # the first epoch was the best one
    assert len(set(history.validation_loss)) == 1


def test_patience_counts_from_the_best_epoch():
    class Losses(Callback):
        """Puts others in their place."""

        coming = iter([math.nan, 5.0, 3.0, 4.0, math.nan, 2.0, 2.0, 2.5, math.nan])

        def on_epoch_end(self, training):
            training.history.loss[-1] = next(self.coming)

    assert len(fit(make_net(), samples(), 20, patience=3, callbacks=[Losses()], batch_size=N)) == 9


def test_callbacks_are_called_in_time():
    class Record(Callback):
        def __init__(self):
            self.calls = []

        def on_batch_end(self, training):
            self.calls.append(("batch", training.epoch, training.batch, training.step, len(training.history)))

        def on_epoch_end(self, training):
            self.calls.append(("epoch", training.epoch, training.batch, training.step, len(training.history)))
            training.stop = training.epoch == 2

    record = Record()
    history = fit(make_net(), samples(), 5, batch_size=45, callbacks=[record])
    assert record.calls == [
        ("batch", 0, 1, 1, 0),
        ("batch", 0, 2, 2, 0),
        ("epoch", 1, 0, 2, 1),
        ("batch", 1, 1, 3, 1),
        ("batch", 1, 2, 4, 1),
        ("epoch", 2, 0, 4, 2),
    ]
    assert len(history) == 2


@pytest.mark.parametrize("validated", [True, False])
def test_a_plateau_lowers_the_learning_rate(validated):
    net, lr = make_net(), 1e-30  # at which the validation loss does not change
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.0, eps=0.0)
    options = {"validation": samples(seed=1)} if validated else {}
    history = fit(net, samples(), 5, optimizer=optimizer, scheduler=scheduler, **options)
    watched = history.validation_loss if validated else history.loss
    assert scheduler.best == min(watched)
    worse = [watched[i] >= min(watched[:i], default=math.inf) for i in range(5)]
    assert worse == [False, True, True, True, True] or not validated
    assert history.learning_rate == pytest.approx([lr * 0.1 ** sum(worse[:i]) for i in range(5)], rel=1e-12, abs=0)


def test_a_csv_file(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("of an earlier run")
    history = fit(make_net(), samples(), 3, log=path, validation=samples())
    with open(path, newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line.pop("epoch") for line in lines] == ["0", "1", "2"]
    for epoch, line in enumerate(lines):
        assert {name: float(text) for name, text in line.items()} == history.row(epoch)
    assert float(lines[1]["residual"]) == max(history.residual[1])
    assert [p.name for p in tmp_path.iterdir()] == ["log.csv"]


def test_tensorboard():
    class Writer:
        def __init__(self):
            self.scalars = []

        def add_scalar(self, name, value, step):
            self.scalars.append((name, value, step))

    writer = Writer()
    history = fit(make_net(), samples(), 2, log=writer)
    expected = [(name, value, i) for i in range(2) for name, value in history.row(i).items() if not math.isnan(value)]
    assert writer.scalars == expected
    assert {"loss", "residual", "step_size"} < {name for name, *_ in expected}
    assert "validation_loss" not in {name for name, *_ in expected}


def test_a_bar_is_shown(capsys):
    fit(make_net(), samples(), 2, progress=True, validation=samples())
    shown = capsys.readouterr().err
    assert "hidden values: 100%" in shown and "training: 100%" in shown and "4/4" in shown
    assert "validation accuracy" in shown
    fit(make_net(), samples(), 1)
    assert capsys.readouterr() == ("", "")


def test_no_epochs():
    net = make_net()
    assert len(fit(net, samples(), 0)) == 0
    assert_same_nets(net, make_net())


def test_history_takes_every_column():
    history = History()
    with pytest.raises(KeyError, match="energy"):
        history.append(loss=1.0)


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"epochs": -1}, ValueError, "epochs: must be at least 0, got -1"),
        ({"epochs": 1.5}, TypeError, "epochs: expected an int, got float 1.5"),
        ({"optimizer": "adam"}, TypeError, r"optimizer: expected torch\.optim\.optimizer\.Optimizer, got str"),
        ({"mode": "stored"}, TypeError, r"mode: expected lgd_kernels\.decoupled\.modes\.Mode, got str"),
        ({"batch_size": 0}, ValueError, "batch_size: must be at least 1, got 0"),
        ({"batch_size": 2.5}, TypeError, "batch_size: expected an int, got float 2.5"),
        ({"seed": None}, TypeError, "seed: expected an int, got NoneType"),
        ({"clip_grad_norm": 0}, ValueError, "clip_grad_norm: must be positive, got 0"),
        ({"clip_grad_norm": math.inf}, ValueError, "clip_grad_norm: must be finite, got inf"),
        ({"patience": 0}, ValueError, "patience: must be at least 1, got 0"),
        ({"autocast": torch.bfloat16}, TypeError, "autocast: expected True or False, got dtype"),
        ({"resume": True}, ValueError, "resume: needs checkpoint, the folder to resume from; got None"),
        ({"log": "no/such/folder.csv"}, ValueError, "log: there is no folder no/such for 'no/such/folder.csv'"),
        ({"log": 3}, TypeError, "log: expected a path or a SummaryWriter, got int"),
        ({"validation": samples()[0]}, TypeError, "validation: expected .*; got Tensor"),
        (
            {"mode": Backpropagation(), "store": lgd.ActivationStore(N, [])},
            ValueError,
            r"store: Backpropagation\(\) keeps no hidden values, got ActivationStore",
        ),
    ],
)
def test_refused_options(options, error, message):
    with pytest.raises(error, match=message):
        fit(make_net(), samples(), **options)


def test_refused_nets():
    net = nn.Linear(D, 3)
    with pytest.raises(TypeError, match=r"net: expected .*DecoupledNetwork or a DistributedNetwork, got Linear"):
        fit(net, samples())


@pytest.mark.parametrize(
    ("store", "message"),
    [
        ((80, [(WIDTH,)] * 3, {}), "store: has n_samples 80, but net, data and mode need 90"),
        (
            (N, [(WIDTH,)] * 2, {}),
            r"store: has shapes \[\(8,\), \(8,\)\], but net, data and mode need \[\(8,\), \(8,\), ",
        ),
        ((N, [(WIDTH,)] * 3, {"multiplier": False}), "store: has multiplier False, but net, data and mode need True"),
        ((N, [(WIDTH,)] * 3, {"device": "meta"}), "store: has device meta, but net, data and mode need "),
    ],
)
def test_refused_stores(store, message):
    n_samples, shapes, options = store
    with pytest.raises(ValueError, match=message):
        fit(make_net(), samples(), store=lgd.ActivationStore(n_samples, shapes, **options))
