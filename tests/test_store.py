"""lgd.ActivationStore: what is scattered is what is gathered, wherever it is kept and whatever happens in between."""

from __future__ import annotations

import errno
import os
from concurrent.futures import Future

import killed
import pytest
import torch

import lgd_kernels as lgd
from lgd_kernels.decoupled import ActivationStore, files
from lgd_kernels.decoupled import store as store_module

SHAPES = [(3,), (2, 2), (), (5,)]
LOCATIONS = ("device", "host", "disk")
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
N = 20


@pytest.fixture(params=LOCATIONS)
def location(request) -> str:
    return request.param


def make(location="device", tmp_path=None, **options):
    path = tmp_path / "map" if location == "disk" else None
    return ActivationStore(N, SHAPES, location=location, path=path, **options)


def rows(*indices):
    return torch.tensor(indices, dtype=torch.int64, device="cpu")


def layers(batch):
    return [*batch.z, *(batch.multiplier or [])]


def joined(batch):
    """The values of a batch side by side, (n, numbers per sample), on the CPU."""
    return torch.cat([layer.flatten(1) if layer.dim() > 1 else layer.unsqueeze(1) for layer in layers(batch)], 1).cpu()


def put(batch, values):
    """Set those values, or a number for all of them."""
    sizes = [layer[0].numel() for layer in layers(batch)]
    columns = torch.as_tensor(values).expand(len(batch.indices), sum(sizes)).split(sizes, 1)
    for layer, of_layer in zip(layers(batch), columns, strict=True):
        layer.copy_(of_layer.reshape(layer.shape))


def fill(store, seed=0):
    """Random values for all samples, as the store keeps them: (N, numbers per sample), on the CPU."""
    batch = store.gather(torch.arange(N, device="cpu"))
    generator = torch.Generator("cpu").manual_seed(seed)
    values = torch.randn(joined(batch).shape, generator=generator, device="cpu")
    put(batch, values)
    store.scatter(batch)
    return values.to(store.dtype)


def content(store):
    return store.state_dict()["rows"].cpu()


# ---------------------------------------------------------------------------------------------------------------------
# Gather and scatter
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("multiplier", [True, False])
def test_what_is_scattered_is_gathered(location, dtype, multiplier, tmp_path):
    store = make(location, tmp_path, dtype=dtype, multiplier=multiplier)
    assert not content(store).any()
    expected = fill(store)
    in_batches = torch.float64 if dtype == torch.float64 else torch.float32
    batch = store.gather(rows(7, 0, 19, 7))
    assert all((t.dtype, t.device) == (in_batches, store.device) and t.is_contiguous() for t in layers(batch))
    assert torch.equal(joined(batch), expected[[7, 0, 19, 7]].to(in_batches))
    batch = store.gather(rows(3, 18))
    changed = layers(batch)
    assert [tuple(t.shape) for t in changed] == [(2, *shape) for shape in SHAPES * (1 + multiplier)]
    for t, tensor in enumerate(changed):
        tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape) + 100 * t)  # all of them exact in bfloat16
    store.scatter(batch)
    everything = [*store.z, *(store.multiplier or [])]
    untouched = [i for i in range(N) if i not in (3, 18)]
    for t, (kept, tensor) in enumerate(zip(everything, changed, strict=True)):
        wanted = torch.arange(tensor.numel(), device=kept.device).view(tensor.shape) + 100 * t
        assert torch.equal(kept[[3, 18]], wanted.to(dtype))
    assert torch.equal(content(store)[untouched], expected[untouched])


def test_a_batch_is_a_copy(location, tmp_path):
    store = make(location, tmp_path)
    expected = fill(store)
    store.gather(rows(1, 2)).z[0].fill_(9.0)
    assert torch.equal(content(store), expected)


@pytest.mark.parametrize("n", [0, 1, 2])
def test_layers_of_a_batch_change_one_by_one(n):
    """Of a single row too, where they need no copy to be contiguous: autograd would take one's change for all's."""
    store = make()
    batch = store.gather(torch.arange(n, device="cpu"))
    before = [layer._version for layer in layers(batch)]
    layers(batch)[0].add_(1)
    assert [layer._version for layer in layers(batch)] == [before[0] + 1, *before[1:]]
    store.scatter(batch)
    assert store.z[0].sum() == 3 * n


def test_values_of_a_batch_suit_decoupled_step_(location, tmp_path):
    x, target = torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
    weight, bias = [torch.randn(5, 3), torch.randn(4, 5), torch.randn(2, 4)], [torch.zeros(d) for d in (5, 4, 2)]
    path = tmp_path / "map" if location == "disk" else None
    batch = ActivationStore(6, [(5,), (4,)], location=location, path=path).gather(rows(5, 0, 2, 3))
    before = joined(batch)
    lgd.decoupled_step_(x, batch.z, weight, bias, target, multiplier=batch.multiplier, step_size=0.1)
    assert not torch.equal(joined(batch), before)


def test_nothing_at_all(location, tmp_path):
    path = tmp_path / "map" if location == "disk" else None
    store = ActivationStore(3, [], location=location, path=path)
    batch = store.gather(rows(2, 1))
    assert (batch.z, batch.multiplier, store.nbytes) == ([], [], 0)
    store.scatter(batch)
    assert [tuple(layer.shape) for layer in make().gather(rows()).z] == [(0, *shape) for shape in SHAPES]


def test_bytes_are_told_before_and_taken_then(location, tmp_path):
    per_sample = 3 + 4 + 1 + 5
    assert ActivationStore.bytes_needed(N, SHAPES) == N * 2 * per_sample * 4
    assert ActivationStore.bytes_needed(N, SHAPES, multiplier=False, dtype=torch.bfloat16) == N * per_sample * 2
    assert ActivationStore.bytes_needed(10**9, [(1024,)] * 128) == 10**9 * 2 * 1024 * 128 * 4
    store = make(location, tmp_path)
    assert store.nbytes == content(store).nbytes == 2080
    assert "2,080 bytes" in repr(store)
    if location == "disk":
        assert (tmp_path / "map").stat().st_size == 2080


# ---------------------------------------------------------------------------------------------------------------------
# Prefetch
# ---------------------------------------------------------------------------------------------------------------------


class AtOnce:
    """A thread that has read everything before anybody goes on."""

    def submit(self, function, *args):
        done = Future()
        done.set_result(function(*args))
        return done


class AtLast:
    """A thread that reads when its result is asked for."""

    def submit(self, function, *args):
        class Later(Future):
            def result(self, timeout=None):
                return function(*args)

        return Later()


@pytest.mark.parametrize("thread", [None, AtOnce, AtLast])
def test_a_prefetch_changes_no_result(location, thread, tmp_path):
    """Gathers, scatters and prefetches at random, beside a plain matrix."""
    store = make(location, tmp_path)
    if thread is not None and location != "device":
        store._thread = thread()
    expected, generator = fill(store), torch.Generator("cpu").manual_seed(1)
    running = store.gather(torch.arange(4, device="cpu"))
    for _ in range(40):
        coming = torch.randperm(N, generator=generator, device="cpu")[:8]
        store.prefetch(coming)
        if torch.rand((), generator=generator, device="cpu") < 0.3:  # somebody else looks in between
            others = torch.randperm(N, generator=generator, device="cpu")[:3]
            assert torch.equal(joined(store.gather(others)), expected[others])
        put(running, joined(running) + 1)
        store.scatter(running)
        expected[running.indices] = joined(running)
        running = store.gather(coming)
        assert torch.equal(joined(running), expected[coming])


def test_a_sample_in_both_batches_is_not_stale(location, tmp_path):
    store = make(location, tmp_path)
    if location != "device":
        store._thread = AtOnce()
    fill(store)
    store.prefetch(rows(9, 6, 0, 4))
    for running in (store.gather(rows(4, 5)), store.gather(rows(6))):
        put(running, 7.0)
        store.scatter(running)
    coming = joined(store.gather(rows(9, 6, 0, 4)))
    assert coming[1].eq(7).all() and coming[3].eq(7).all()
    assert torch.equal(coming[[0, 2]], content(store)[[9, 0]])
    assert not coming[[0, 2]].eq(7).any()


@pytest.mark.parametrize("location", ["host", "disk"])
def test_a_gather_takes_what_was_prefetched(location, tmp_path, monkeypatch):
    store = make(location, tmp_path)
    fill(store)
    store.prefetch(rows(1, 2))
    store.prefetch(rows(3, 4))  # takes the place of the one before
    store._prefetched.rows.result()
    reads = []
    monkeypatch.setattr(store, "_read", lambda indices: reads.append(indices))
    assert torch.equal(joined(store.gather(rows(3, 4))), content(store)[[3, 4]])
    assert reads == []


def test_a_load_outdates_a_prefetch(location, tmp_path):
    store, other = make(location, tmp_path), make()
    if location != "device":
        store._thread = AtOnce()
    fill(store, 0)
    expected = fill(other, 1)
    store.prefetch(rows(1, 2))
    store.load_state_dict(other.state_dict())
    assert torch.equal(joined(store.gather(rows(1, 2))), expected[[1, 2]])


# ---------------------------------------------------------------------------------------------------------------------
# bfloat16
# ---------------------------------------------------------------------------------------------------------------------


def scattered(values, **options):
    """What a store of bfloat16 keeps of these numbers, as float32."""
    store = ActivationStore(len(values), [(values.shape[1],)], multiplier=False, dtype=torch.bfloat16, **options)
    batch = store.gather(torch.arange(len(values), device="cpu"))
    put(batch, values)
    store.scatter(batch)
    return store.z[0].float()


def test_to_nearest_small_changes_get_lost():
    values = torch.full((1, 1000), 1 + 1 / 512)  # a quarter of the way from 1 to its neighbour 1 + 1/128
    assert scattered(values).eq(1).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_random_rounding_keeps_them_on_average(sign):
    n = 40_000
    kept = scattered(torch.full((1, n), sign * (1 + 1 / 512)), rounding_seed=3) * sign
    assert set(kept.unique().tolist()) == {1.0, 1 + 1 / 128}
    share = kept.ne(1).double().mean().item()
    assert abs(share - 0.25) < 5 * (0.25 * 0.75 / n) ** 0.5  # five standard errors of a share of a quarter


def test_random_rounding_leaves_what_bfloat16_has():
    nans = torch.tensor([0x7F800001, 0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)  # by their last bits, all
    values = torch.tensor([0.0, -0.0, 1.5, -3.0, 2.0**-130, torch.inf, -torch.inf, 3.3895313892515355e38])
    kept = scattered(torch.cat([values, nans]).repeat(50, 1), rounding_seed=0)
    assert torch.equal(kept[:, :8], values.repeat(50, 1)) and kept[:, 1].signbit().all()
    assert kept[:, 8:].isnan().all()


def test_random_rounding_is_repeated_by_its_seed_and_after_a_load(tmp_path):
    values = torch.randn(1, 1000)
    assert torch.equal(scattered(values, rounding_seed=3), scattered(values, rounding_seed=3))
    assert not torch.equal(scattered(values, rounding_seed=3), scattered(values, rounding_seed=4))
    first, second = (make(dtype=torch.bfloat16, rounding_seed=seed) for seed in (1, 2))
    fill(first)
    first.save(tmp_path / "saved")
    second.load(tmp_path / "saved")
    fill(first, 1), fill(second, 1)
    assert torch.equal(content(first), content(second))


# ---------------------------------------------------------------------------------------------------------------------
# From one process to the next
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_saved_store_comes_back_bit_for_bit(location, dtype, tmp_path):
    store, other = make(location, tmp_path, dtype=dtype), make(dtype=dtype)
    fill(store)
    batch = store.gather(rows(0))
    batch.z[0].copy_(torch.tensor([[torch.nan, -0.0, torch.inf]]))
    store.scatter(batch)
    store.save(tmp_path / "saved")
    saved = content(store).clone()
    fill(store, 1)  # what happens after a save does not change it
    other.load(tmp_path / "saved")
    assert torch.equal(content(other).view(torch.uint8), saved.view(torch.uint8))
    store.load(tmp_path / "saved")
    assert torch.equal(content(store).view(torch.uint8), saved.view(torch.uint8))
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted({"saved"} | ({"map"} if location == "disk" else set()))


def test_a_map_on_disk_is_opened_again(tmp_path):
    expected = fill(make("disk", tmp_path))
    assert torch.equal(content(make("disk", tmp_path)), expected)
    with pytest.raises(ValueError, match=r"path: .*map has 2,080 bytes, but a store of these samples needs 1,040"):
        make("disk", tmp_path, multiplier=False)


def test_flush_brings_the_file_to_the_disk(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    make().flush()
    assert synced == []
    make("disk", tmp_path).flush()
    assert synced == [(tmp_path / "map").stat().st_ino]


def save_second(report, path):
    """What the killed process does: it saves other values over the file's."""
    store = ActivationStore(N, SHAPES)
    fill(store, 2)
    store.save(path)
    report("end")


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("what", "count", "seed"),
    [("write", 1, 1), ("write", 5, 1), ("fsync", 1, 1), ("replace", 1, 1), ("replaced", 1, 2), ("fsync", 2, 2)],
)
def test_a_killed_save_leaves_the_former_file(what, count, seed, tmp_path):
    store, path = make(), tmp_path / "saved"
    fill(store, 1)
    store.save(path)
    assert killed.run(save_second, path, kill_at=killed.Moment(what, count))
    store.load(path)
    other = make()
    assert torch.equal(content(store), fill(other, seed))
    assert (tmp_path / "saved.partial").exists() == (seed == 1)  # it was killed in the middle
    store.save(path)  # and the next save is not disturbed by what is left
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]


def test_a_save_waits_for_the_disk_before_it_replaces(tmp_path, monkeypatch):
    """What a loss of power could undo otherwise, which no killed process shows."""
    done, replace = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: done.append(("fsync", os.fstat(descriptor).st_ino)))
    monkeypatch.setattr(os, "replace", lambda old, new: (done.append("replace"), replace(old, new)))
    make().save(tmp_path / "saved")
    of_file, of_folder = (path.stat().st_ino for path in (tmp_path / "saved", tmp_path))
    assert done == [("fsync", of_file), "replace", ("fsync", of_folder)]


def test_a_save_that_fails_leaves_the_former_file(tmp_path, monkeypatch):
    store, path = make(), tmp_path / "saved"
    expected = fill(store, 1)
    store.save(path)
    fill(store, 2)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            store.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]
    store.load(path)
    assert torch.equal(content(store), expected)


@pytest.mark.parametrize("part", [0.0, 0.3, 0.999])
def test_a_file_that_is_cut_short_is_refused(part, tmp_path):
    store, path = make(), tmp_path / "saved"
    expected = fill(store)
    store.save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(part * len(data))])
    with pytest.raises(ValueError, match=r"saved: is cut short or not a file of torch\.save"):
        store.load(path)
    assert torch.equal(content(store), expected)


def test_a_changed_bit_is_noticed(tmp_path):
    store, path = make(), tmp_path / "saved"
    values = fill(store)
    store.save(path)
    data = bytearray(path.read_bytes())
    data[data.index(values[3].numpy().tobytes())] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"saved: is damaged, the checksum of its part archive/data/\d+ is wrong"):
        store.load(path)


class Code:
    """Would run in whoever unpickles it."""

    def __reduce__(self):
        return (os.mkdir, ("was_run",))


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"rows": Code()}, tmp_path / "evil")
    with pytest.raises(TypeError, match=r"evil: holds something other than tensors and plain containers"):
        make().load(tmp_path / "evil")
    with pytest.raises(TypeError, match=r"good: holds something other than tensors and plain containers"):
        files.save({"rows": Code()}, tmp_path / "good")
    assert [p.name for p in tmp_path.iterdir()] == ["evil"]


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n_samples": -1}, ValueError, "n_samples: must not be negative, got -1"),
        ({"n_samples": 2.0}, TypeError, "n_samples: expected an int, got float 2.0"),
        ({"shapes": [(3,), (-2, 4)]}, ValueError, r"shapes: expected sizes of at least 0 for layer 1, got \(-2, 4\)"),
        ({"dtype": torch.float16}, TypeError, "dtype: must be one of .*, got torch.float16"),
        ({"multiplier": 1}, TypeError, "multiplier: expected True or False, got int 1"),
        ({"location": "gpu"}, ValueError, "location: unknown value 'gpu'; choose one of 'device', 'host', 'disk'"),
        ({"location": "disk"}, ValueError, "path: is for location='disk', which needs it; got None for .*'disk'"),
        ({"path": "x"}, ValueError, "path: is for location='disk', which needs it; got 'x' for location='device'"),
        ({"rounding_seed": 1}, ValueError, "rounding_seed: is for dtype torch.bfloat16, got 1 for torch.float32"),
    ],
)
def test_refused_stores(options, error, message):
    with pytest.raises(error, match=message):
        ActivationStore(**({"n_samples": 4, "shapes": [(3,)]} | options))


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        ([1], TypeError, "indices: expected a torch.Tensor, got list"),
        (torch.tensor([1], dtype=torch.int32), TypeError, "indices: expected int64 on the CPU, got torch.int32 on "),
        (torch.zeros(1, 1, dtype=torch.int64, device="cpu"), ValueError, r"indices: expected 1 dimension, got 2 "),
        (rows(3, 20, -1), IndexError, "indices: 20 at position 1 is not one of 20 samples"),
        (rows(3, 0, -1), IndexError, "indices: -1 at position 2 is not one of 20 samples"),
    ],
)
def test_refused_indices(indices, error, message):
    store = make("host")
    for method in (store.gather, store.prefetch):
        with pytest.raises(error, match=message):
            method(indices)


def test_refused_batches(location, tmp_path):
    store = make(location, tmp_path)
    expected, batch = fill(store), store.gather(rows(2, 5, 2))
    with pytest.raises(ValueError, match="batch: has sample 2 2 times, and it can have one value"):
        store.scatter(batch)
    batch = store.gather(rows(2, 5))
    for change, error, message in (
        ({"z": [*batch.z[:-1], batch.z[-1][:, 1:]]}, ValueError, r"z\[3\] has shape \(2, 4\), in .* it has \(2, 5\)"),
        ({"indices": rows(2)}, ValueError, r"z\[0\] has shape \(2, 3\), in this store it has \(1, 3\)"),
        ({"multiplier": batch.z[:3]}, ValueError, "multiplier has 3 layers, in this store it has 4"),
        ({"multiplier": None}, ValueError, "multiplier has 0 layers, in this store it has 4"),
        (
            {"z": [layer.double() for layer in batch.z]},
            TypeError,
            r"z\[0\] is torch\.float64 on .*it is torch\.float32 on",
        ),
    ):
        with pytest.raises(error, match=f"batch: {message}"):
            store.scatter(batch._replace(**change))
    assert torch.equal(content(store), expected)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"n_samples": 19}, "n_samples: the saved store has 19, this one has 20"),
        ({"shapes": [(26,)], "multiplier": False}, r"shapes: the saved store has \[\(26,\)\], this one has \[\(3,\), "),
        ({"multiplier": False}, "multiplier: the saved store has False, this one has True"),
        ({"dtype": torch.float64}, "dtype: the saved store has torch.float64, this one has torch.float32"),
    ],
)
def test_a_store_of_another_kind_is_not_loaded(other, message, tmp_path):
    ActivationStore(**({"n_samples": N, "shapes": SHAPES} | other)).save(tmp_path / "saved")
    store = make()
    expected = fill(store)
    with pytest.raises(ValueError, match=message):
        store.load(tmp_path / "saved")
    assert torch.equal(content(store), expected)


def test_a_file_of_something_else_is_not_loaded(tmp_path):
    files.save({"net": torch.zeros(3)}, tmp_path / "saved")
    with pytest.raises(ValueError, match=r"state: expected that of an ActivationStore, with n_samples, .*; got net"):
        make().load(tmp_path / "saved")


def test_a_full_disk_is_told_before_training(tmp_path, monkeypatch):
    def full(descriptor, offset, length):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store_module.os, "posix_fallocate", full)
    with pytest.raises(OSError, match="the store needs 2,080 bytes: No space left on device"):
        make("disk", tmp_path)
    assert list(tmp_path.iterdir()) == []
