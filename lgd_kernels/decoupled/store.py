"""The hidden values z and multipliers lambda of a whole data set, kept from one visit of a sample to the next.

A sample is one row of one matrix: z_1 .. z_(T-1) side by side, then its multipliers. So a minibatch is fetched by one
`index_select` and put back by one `index_copy_`, for all layers at once, and on disk a sample lies in one place.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lgd_kernels.arguments import check_bool, check_int, one_of
from lgd_kernels.decoupled import files
from lgd_kernels.reference import accumulation_dtype

LOCATIONS = ("device", "host", "disk")
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


class StoredBatch(NamedTuple):
    """The values of n samples, to be moved and scattered."""

    indices: Tensor  # (n,) int64, on the CPU
    z: list[Tensor]  # T-1 contiguous tensors (n, *shape)
    multiplier: list[Tensor] | None  # like z


class ActivationStore:
    """z and lambda of every sample of a data set, by the index of the sample; all 0 at first.

        store = ActivationStore(len(x), [z_t.shape[1:] for z_t in net.hidden_values(x[:1])])
        batch = store.gather(indices)
        net.visit_(x[indices], batch.z, target[indices], multiplier=batch.multiplier, step_size=0.1)  # moves them
        store.scatter(batch)

    It takes `nbytes` bytes: `bytes_needed` tells before they are taken.

    Args:
        n_samples: of the data set.
        shapes: of one sample's z_1 .. z_(T-1), layer by layer, such as [(64,), (8, 6, 6)].
        multiplier: whether multipliers are kept too.
        location: "device"; "host": memory of the CPU, pinned if the device is a CUDA device; "disk": a file that is
            mapped into memory, so that what the system's cache of files cannot hold waits on the disk.
        device: of the gathered batches; None is torch's default device.
        dtype: of the stored values: float64, float32 or bfloat16. Batches are in float64 for float64, else in float32.
            A change of a value by less than 1/256 of it may get lost in bfloat16, see rounding_seed.
        path: of the file, for the location "disk". A file that is there must have the right size, and its values are
            kept; they are whatever the last process wrote last, so that after a crash a checkpoint is the thing to
            load.
        rounding_seed: for bfloat16. None: to nearest. A seed: up or down at random, in proportion to what is nearer, so
            that small changes are kept on average.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value, or that does not fit the others.
        OSError: the disk has not the space for the file.
    """

    def __init__(
        self,
        n_samples: int,
        shapes: Sequence[Sequence[int]],
        *,
        multiplier: bool = True,
        location: str = "device",
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        path: str | os.PathLike | None = None,
        rounding_seed: int | None = None,
    ):
        self.nbytes = self.bytes_needed(n_samples, shapes, multiplier=multiplier, dtype=dtype)
        one_of("location", location, LOCATIONS)
        if (path is None) == (location == "disk"):
            raise ValueError(f"path: is for location='disk', which needs it; got {path!r} for location={location!r}")
        self.n_samples, self.shapes = n_samples, [tuple(shape) for shape in shapes]
        self.location, self.dtype = location, dtype
        self.device = torch.empty(0, device=device).device  # with its number, as tensors have it
        self.path = None if path is None else Path(path)
        self._with_multiplier = multiplier
        self._widths = [math.prod(shape) for shape in self.shapes] * (1 + multiplier)
        self._rows = self._allocate()  # (n_samples, numbers per sample)
        self._generator = _generator(rounding_seed, dtype, self.device)
        self._prefetched: _Prefetched | None = None
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, "ActivationStore") if location != "device" else None

    @staticmethod
    def bytes_needed(
        n_samples: int,
        shapes: Sequence[Sequence[int]],
        *,
        multiplier: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> int:
        """The bytes that a store with these arguments takes."""
        check_int("n_samples", n_samples)
        if n_samples < 0:
            raise ValueError(f"n_samples: must not be negative, got {n_samples}")
        check_bool("multiplier", multiplier)
        if dtype not in DTYPES:
            raise TypeError(f"dtype: must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
        for t, shape in enumerate(shapes):
            if not all(isinstance(size, int) and size >= 0 for size in shape):
                raise ValueError(f"shapes: expected sizes of at least 0 for layer {t}, got {tuple(shape)}")
        return n_samples * (1 + multiplier) * sum(math.prod(shape) for shape in shapes) * dtype.itemsize

    @property
    def z(self) -> list[Tensor]:
        """z of all samples, T-1 views (n_samples, *shape) of what is stored; to look at."""
        return self._layers(self._rows, contiguous=False)[0]

    @property
    def multiplier(self) -> list[Tensor] | None:
        """The multipliers of all samples, like z; None where none are kept."""
        return self._layers(self._rows, contiguous=False)[1]

    def __len__(self) -> int:
        return self.n_samples

    def __repr__(self) -> str:
        kinds = "z and multipliers" if self._with_multiplier else "z"
        where = f"on disk in {self.path}" if self.location == "disk" else f"on {self._rows.device}"
        return (
            f"ActivationStore({kinds} of {self.n_samples:,} samples, {len(self.shapes)} layers, {self.dtype}, "
            f"{self.nbytes:,} bytes {where})"
        )

    # -----------------------------------------------------------------------------------------------------------------
    # Minibatches
    # -----------------------------------------------------------------------------------------------------------------

    def gather(self, indices: Tensor) -> StoredBatch:
        """A copy of the values of these samples, on the device.

        indices: (n,) int64 on the CPU; a sample may be there several times.

        Raises IndexError for an index that is no sample's, TypeError and ValueError for what is not such a tensor.
        """
        self._check_indices(indices)
        rows = self._take(indices)
        rows = self._read(indices) if rows is None else rows
        # contiguous: a visit of 127 layers of 64 units took 36 ms then, and 48 with all of them side by side in rows
        return StoredBatch(indices, *self._layers(rows, contiguous=True))

    def scatter(self, batch: StoredBatch) -> None:
        """Put a gathered batch back, with the values that it has now. No sample may be there twice.

        Raises TypeError and ValueError for a batch that does not fit this store, or has a sample twice.
        """
        self._check_indices(batch.indices)
        self._check_batch(batch)
        if not self.nbytes:
            return
        if self._prefetched is not None:
            self._prefetched.outdated.append(batch.indices)
        layers = zip([*batch.z, *(batch.multiplier or ())], self._widths, strict=True)
        rows = torch.cat([layer.reshape(len(layer), width) for layer, width in layers], dim=1)
        rows = _to_bfloat16(rows, self._generator) if self.dtype == torch.bfloat16 else rows
        place = self._rows.device
        self._rows.index_copy_(0, batch.indices.to(place), rows.to(place))

    def prefetch(self, indices: Tensor) -> None:
        """Begin to gather these samples, which the next `gather` with the same indices will find ready.

        It reads on a stream of its own where the device is a CUDA device, and in a thread of its own where the values
        are not on the device. On the CPU's own memory it does nothing: there the gather is no slower than it.

        The result is that of a gather without a prefetch: the rows of samples that are scattered in between are read
        once more. There is one prefetch at a time; another one takes its place.

        Raises as `gather`.
        """
        self._check_indices(indices)
        if self._stream is None and self._thread is None:
            return
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))  # for the scatters before
        rows = self._thread.submit(self._read_aside, indices) if self._thread else self._read_aside(indices)
        self._prefetched = _Prefetched(indices, rows, [])

    def _take(self, indices: Tensor) -> Tensor | None:
        """The prefetched rows, if it is these that were prefetched."""
        if self._prefetched is None or not torch.equal(self._prefetched.indices, indices):
            return None
        _, rows, outdated = self._prefetched
        self._prefetched = None
        rows = rows.result() if isinstance(rows, Future) else rows
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)
            rows.record_stream(torch.cuda.current_stream(self.device))
        if outdated:
            again = torch.isin(indices, torch.cat(outdated)).nonzero().squeeze(1)
            rows.index_copy_(0, again.to(rows.device), self._read(indices[again]))
        return rows

    def _read_aside(self, indices: Tensor) -> Tensor:
        with torch.cuda.stream(self._stream):  # of None: the current one
            return self._read(indices)

    def _read(self, indices: Tensor) -> Tensor:
        """(n, numbers per sample) on the device, in the dtype of batches."""
        place = self._rows.device
        pinned = self._stream is not None and place.type == "cpu"
        shape = (len(indices), self._rows.shape[1])
        rows = torch.empty(shape, dtype=self.dtype, device=place, pin_memory=pinned)
        torch.index_select(self._rows, 0, indices.to(place, non_blocking=True), out=rows)
        return rows.to(self.device, non_blocking=True).to(accumulation_dtype(self.dtype))

    def _layers(self, rows: Tensor, *, contiguous: bool) -> tuple[list[Tensor], list[Tensor] | None]:
        """z and the multipliers, layer by layer; as views, or each in memory of its own."""
        parts = rows.split(self._widths, dim=1)
        if contiguous:  # a view of one row or none would be contiguous too, but autograd sees it change with the others
            parts = [part.clone(memory_format=torch.contiguous_format) for part in parts]
        shapes, n_layers = self.shapes * (1 + self._with_multiplier), len(self.shapes)
        layers = [part.view(len(rows), *shape) for part, shape in zip(parts, shapes, strict=True)]
        return layers[:n_layers], layers[n_layers:] if self._with_multiplier else None

    # -----------------------------------------------------------------------------------------------------------------
    # From one process to the next
    # -----------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that is stored. The values are not copied: they change with the next scatter."""
        rounding = None if self._generator is None else self._generator.get_state()
        return {**self._description(), "rows": self._rows, "rounding": rounding}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the values of a store of the same samples, shapes and dtype, wherever it was.

        Raises ValueError with both values where the two differ.
        """
        description = self._description()
        if not description.keys() <= state.keys():
            wanted, given = ", ".join(description), ", ".join(state)
            raise ValueError(f"state: expected that of an ActivationStore, with {wanted}; got {given}")
        for name, ours in description.items():
            if state[name] != ours:
                raise ValueError(f"{name}: the saved store has {state[name]}, this one has {ours}")
        self._prefetched = None
        self._rows.copy_(state["rows"])
        if self._generator is not None:
            self._generator.set_state(state["rounding"])

    def save(self, path: str | os.PathLike) -> None:
        """Write everything to a file. Until all of it is on the disk, a former file at path stays as it was."""
        files.save(self.state_dict(), path)

    def load(self, path: str | os.PathLike) -> None:
        """Take over what `save` wrote, bit for bit.

        Raises FileNotFoundError, and ValueError for a damaged file or one of another kind of store.
        """
        self.load_state_dict(files.load(path))

    def flush(self) -> None:
        """For the location "disk": wait until the file has everything, so that the machine may lose its power.

        It is not needed against the death of the process: what was scattered is then the system's to write.
        """
        if self.path is not None:
            files.sync(self.path)

    def _description(self) -> dict[str, Any]:
        """What two stores must have in common for one to take over the other's values."""
        return {
            "n_samples": self.n_samples,
            "shapes": self.shapes,
            "multiplier": self._with_multiplier,
            "dtype": self.dtype,
            "stochastic_rounding": self._generator is not None,
        }

    # -----------------------------------------------------------------------------------------------------------------
    # Memory and checks
    # -----------------------------------------------------------------------------------------------------------------

    def _allocate(self) -> Tensor:
        shape = (self.n_samples, sum(self._widths))
        if self.location == "disk":
            return _mapped(self.path, self.nbytes, self.dtype).view(shape)
        if self.location == "host":
            return torch.zeros(shape, dtype=self.dtype, device="cpu", pin_memory=self.device.type == "cuda")
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def _check_indices(self, indices: Tensor) -> None:
        if not isinstance(indices, Tensor):
            raise TypeError(f"indices: expected a torch.Tensor, got {type(indices).__name__}")
        if indices.dtype != torch.int64 or indices.device.type != "cpu":
            raise TypeError(f"indices: expected int64 on the CPU, got {indices.dtype} on {indices.device}")
        if indices.dim() != 1:
            raise ValueError(f"indices: expected 1 dimension, got {indices.dim()} (shape {tuple(indices.shape)})")
        wrong = ((indices < 0) | (indices >= self.n_samples)).nonzero()
        if len(wrong):
            at = int(wrong[0])
            raise IndexError(f"indices: {int(indices[at])} at position {at} is not one of {self.n_samples} samples")

    def _check_batch(self, batch: StoredBatch) -> None:
        n, dtype = len(batch.indices), accumulation_dtype(self.dtype)
        shapes = [(n, *shape) for shape in self.shapes]
        for name, layers, wanted in (
            ("z", batch.z, shapes),
            ("multiplier", batch.multiplier or [], shapes if self._with_multiplier else []),
        ):
            if len(layers) != len(wanted):
                raise ValueError(f"batch: {name} has {len(layers)} layers, in this store it has {len(wanted)}")
            for t, (layer, shape) in enumerate(zip(layers, wanted, strict=True)):
                if (layer.dtype, layer.device) != (dtype, self.device):
                    given = f"{layer.dtype} on {layer.device}"
                    raise TypeError(f"batch: {name}[{t}] is {given}, in this store it is {dtype} on {self.device}")
                if layer.shape != shape:
                    given = tuple(layer.shape)
                    raise ValueError(f"batch: {name}[{t}] has shape {given}, in this store it has {shape}")
        samples, times = batch.indices.unique(return_counts=True)
        if len(samples) < n:
            twice = int(samples[times > 1][0])
            raise ValueError(f"batch: has sample {twice} {int(times[times > 1][0])} times, and it can have one value")


class _Prefetched(NamedTuple):
    indices: Tensor
    rows: Tensor | Future[Tensor]
    outdated: list[Tensor]  # indices that were scattered since


def _mapped(path: Path, nbytes: int, dtype: torch.dtype) -> Tensor:
    """The file as a tensor of one dimension; a new file of zeros if there is none."""
    if not path.exists():
        with open(path, "xb") as file:
            _reserve(file.fileno(), path, nbytes)
    size = path.stat().st_size
    if size != nbytes:
        raise ValueError(f"path: {path} has {size:,} bytes, but a store of these samples needs {nbytes:,}")
    if nbytes == 0:
        return torch.zeros(0, dtype=dtype, device="cpu")  # nothing cannot be mapped
    return torch.from_file(str(path), shared=True, size=nbytes // dtype.itemsize, dtype=dtype, device="cpu")


def _reserve(descriptor: int, path: Path, nbytes: int) -> None:
    """Give the file its bytes now: where a disk is full, a write to a mapped file kills the process."""
    if nbytes == 0:
        return
    try:
        os.posix_fallocate(descriptor, 0, nbytes)
    except OSError as error:
        path.unlink()
        raise OSError(
            error.errno, f"the store needs {nbytes:,} bytes: {os.strerror(error.errno)}", str(path)
        ) from error


def _generator(seed: int | None, dtype: torch.dtype, device: torch.device) -> torch.Generator | None:
    if seed is None:
        return None
    check_int("rounding_seed", seed)
    if dtype != torch.bfloat16:
        raise ValueError(f"rounding_seed: is for dtype torch.bfloat16, got {seed} for {dtype}")
    return torch.Generator(device).manual_seed(seed)


def _to_bfloat16(values: Tensor, generator: torch.Generator | None) -> Tensor:
    """To nearest; with a generator away from 0 with the probability of how far from 0 it is, and else towards 0."""
    if generator is None:
        return values.to(torch.bfloat16)
    bits = values.contiguous().view(torch.int32)  # of which bfloat16 has the upper half
    noise = torch.randint(1 << 16, bits.shape, dtype=torch.int32, device=bits.device, generator=generator)
    rounded = ((bits + noise) & -(1 << 16)).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)
