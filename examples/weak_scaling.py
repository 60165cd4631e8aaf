"""Time a visit of a decoupled net on 1, 2 and 4 processes of this machine, beside a model of what they send.

The work of a process stays the same (weak scaling): --layers layers and --samples samples each, so that a mesh of
L x D processes trains a net of L times as many layers on D times as many samples. The processes have one thread each
and talk by gloo over loopback. Other programs on the machine spoil the times: the efficiency is a lower bound.

The model has a rank's floating-point operations and bytes, from the equations of the visit, and three rates. For this
machine the rates are measured: that of one process, and the latency and bandwidth of a message. For 64 GPUs they are
assumptions, given as options, and what is printed is a projection: nothing of it was measured.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing
from tqdm import tqdm

import lgd_kernels as lgd
from lgd_kernels.decoupled import residual_net
from lgd_kernels.decoupled.distributed import BUCKET_BYTES, DistributedNetwork
from lgd_kernels.decoupled.neighbours import layer_data_mesh

Mesh = tuple[int, int]  # (blocks of layers, shards of samples)
MESHES: list[list[Mesh]] = [[(1, 1)], [(2, 1), (1, 2)], [(4, 1), (2, 2), (1, 4)]]
OF_64: list[Mesh] = [(1, 64), (8, 8), (64, 1)]
N_CLASSES = 10
FLOAT = 4  # bytes


class Work(NamedTuple):
    """The work of one process."""

    layers: int
    width: int
    samples: int
    steps: int  # of z, in a visit


class Rates(NamedTuple):
    flops: float  # per second, of one process
    latency: float  # seconds, of one message
    bandwidth: float  # bytes per second, of one process


class Traffic(NamedTuple):
    """What a rank in the middle of the mesh does in a visit."""

    flops: float
    boundary_bytes: int  # sent over one boundary of blocks, both ways together
    boundary_messages: int  # that wait for each other
    gradient_bytes: int  # that a ring all-reduce sends
    gradient_messages: int

    @property
    def step_bytes(self) -> int:
        return self.boundary_bytes + self.gradient_bytes


class Measured(NamedTuple):
    seconds: float  # median, of a visit
    latency: float
    bandwidth: float


# ---------------------------------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------------------------------


def traffic(work: Work, n_layer: int, n_data: int) -> Traffic:
    """Every step of z and the last evaluation is a product forward and one back, in every layer: 2 n d^2 each. A
    boundary value travels once and then twice in every step. Gradients are summed in buckets of whole layers."""
    values = FLOAT * work.samples * work.width
    transfers = 2 * work.steps + 1 if n_layer > 1 else 0
    gradients = FLOAT * work.layers * (work.width + 1) * work.width
    layers_of_bucket = math.ceil(BUCKET_BYTES / (FLOAT * work.width**2))
    return Traffic(
        flops=4 * (work.steps + 1) * work.layers * work.samples * work.width**2,
        boundary_bytes=transfers * values,
        boundary_messages=transfers,
        gradient_bytes=2 * (n_data - 1) * gradients // n_data,
        gradient_messages=2 * (n_data - 1) * math.ceil(work.layers / layers_of_bucket),
    )


def seconds_of(traffic: Traffic, rates: Rates) -> float:
    """Without any overlap of messages and arithmetic, and so at most; without the sums of the energies."""
    messages = traffic.boundary_messages + traffic.gradient_messages
    return traffic.flops / rates.flops + messages * rates.latency + traffic.step_bytes / rates.bandwidth


# ---------------------------------------------------------------------------------------------------------------------
# The measurement
# ---------------------------------------------------------------------------------------------------------------------


def measure(work: Work, meshes: list[Mesh], visits: int) -> dict[Mesh, Measured]:
    """Meshes of the same number of processes, which are started for it."""
    n_ranks = math.prod(meshes[0])
    results = torch.multiprocessing.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        args = (n_ranks, Path(folder) / "rendezvous", work, meshes, visits, results)
        torch.multiprocessing.start_processes(_rank, args, n_ranks, start_method="spawn")
    return results.get()


def _rank(rank: int, n_ranks: int, rendezvous: Path, work: Work, meshes: list[Mesh], visits: int, results) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=n_ranks)
    messages = _time_messages() if n_ranks > 1 else (0.0, math.inf)
    measured = {mesh: Measured(_time_visits(work, mesh, visits), *messages) for mesh in meshes}
    if rank == 0:
        results.put(measured)
    dist.destroy_process_group()


def _time_visits(work: Work, mesh: Mesh, visits: int) -> float:
    torch.manual_seed(0)
    depth = work.layers * mesh[0] - 1
    net = lgd.DecoupledNetwork(residual_net(work.width, work.width, depth, N_CLASSES))
    x, target = torch.randn(work.samples, work.width), torch.randint(N_CLASSES, (work.samples,))
    part = DistributedNetwork(net, layer_data_mesh(*mesh), x[:2])
    z = part.hidden_values(x)
    multiplier = [torch.zeros_like(value) for value in z]
    optimizer = torch.optim.SGD(part.parameters(), lr=1e-3)
    options = {"multiplier": multiplier, "step_size": 0.1, "steps": work.steps, "optimizer": optimizer}
    seconds = []
    for _ in range(visits + 3):
        dist.barrier()
        began = time.perf_counter()
        part.visit_(x, z, target, **options)
        seconds.append(time.perf_counter() - began)
    return median(seconds[3:])  # the first ones allocate


def _time_messages(rounds: int = 20) -> tuple[float, float]:
    """(latency, bandwidth) of a message between ranks 0 and 1, half of what there and back takes."""

    def there_and_back(message: torch.Tensor) -> float:
        seconds = []
        for _ in range(rounds if dist.get_rank() < 2 else 0):
            began = time.perf_counter()
            for sender in (0, 1):
                (dist.send if dist.get_rank() == sender else dist.recv)(message, 1 - dist.get_rank())
            seconds.append(time.perf_counter() - began)
        return median(seconds) / 2 if seconds else 0.0

    short, long = torch.zeros(1), torch.zeros(1 << 20)
    latency, whole = there_and_back(short), there_and_back(long)
    return latency, long.nbytes / max(whole - latency, 1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# What comes of it
# ---------------------------------------------------------------------------------------------------------------------


def table(work: Work, measured: dict[Mesh, Measured]) -> str:
    alone, n_cores = measured[1, 1].seconds, len(os.sched_getaffinity(0))
    rate = traffic(work, 1, 1).flops / alone
    lines = [
        f"MEASURED on {n_cores} cores; each process has {work.layers} layers of {work.width} units and {work.samples} "
        f"samples; {work.steps} steps of z",
        "",
        f"{'layer x data':>12}{'kB sent':>12}{'messages':>12}{'model':>12}{'measured':>12}{'efficiency':>12}",
    ]
    for mesh, (seconds, latency, bandwidth) in measured.items():
        of_mesh = traffic(work, *mesh)
        turns = max(1.0, math.prod(mesh) / n_cores)
        modelled = seconds_of(of_mesh, Rates(rate / turns, latency, bandwidth))
        messages = of_mesh.boundary_messages + of_mesh.gradient_messages
        lines.append(
            f"{mesh[0]:>8} x {mesh[1]}{of_mesh.step_bytes / 1e3:12.0f}{messages:12}{1e3 * modelled:9.2f} ms"
            f"{1e3 * seconds:9.2f} ms{100 * alone / seconds:10.0f} %"
        )
    lines += [
        "",
        "kB sent, messages: of a rank, in a visit; the messages wait for each other",
        "model: no message is hidden behind arithmetic; processes beyond the cores take turns",
        "efficiency: the time of one process to the measured one",
    ]
    return "\n".join(lines)


def projection(work: Work, rates: Rates) -> str:
    lines = [
        "PROJECTION to 64 GPUs, from the model alone; no such machine was used",
        f"assumed: {rates.flops:.3g} flop/s, {rates.latency:.3g} s a message, {rates.bandwidth:.3g} bytes/s per GPU;"
        f" {work.layers} layers of {work.width} units and {work.samples} samples each",
        "",
        f"{'layer x data':>12}{'MB sent per':>14}{'arithmetic':>12}{'all, at most':>14}{'efficiency,':>13}",
        f"{'':>12}{'rank, visit':>14}{'':>12}{'':>14}{'at least':>13}",
    ]
    for mesh in OF_64:
        of_mesh = traffic(work, *mesh)
        arithmetic, everything = of_mesh.flops / rates.flops, seconds_of(of_mesh, rates)
        lines.append(
            f"{mesh[0]:>7} x {mesh[1]:<2}{of_mesh.step_bytes / 1e6:14.1f}{1e3 * arithmetic:9.2f} ms"
            f"{1e3 * everything:11.2f} ms{100 * arithmetic / everything:11.0f} %"
        )
    return "\n".join(lines)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--layers", type=int, default=8, metavar="N", help="of one process (default: %(default)s)")
    add("--width", type=int, default=128, metavar="N", help="units of a layer (default: %(default)s)")
    add("--samples", type=int, default=128, metavar="N", help="of one process (default: %(default)s)")
    add("--steps", type=int, default=8, metavar="K", help="of z in a visit (default: %(default)s)")
    add("--visits", type=int, default=20, metavar="N", help="that are timed (default: %(default)s)")
    gpu = parser.add_argument_group("assumptions about a GPU and its links")
    gpu.add_argument("--gpu-work", type=int, nargs=3, default=(8, 4096, 4096), metavar=("LAYERS", "WIDTH", "SAMPLES"))
    gpu.add_argument("--gpu-flops", type=float, default=2e14, help="per second (default: %(default)s)")
    gpu.add_argument("--gpu-latency", type=float, default=2e-5, help="seconds of a message (default: %(default)s)")
    gpu.add_argument("--gpu-bandwidth", type=float, default=5e10, help="bytes per second (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    work = Work(args.layers, args.width, args.samples, args.steps)
    measured: dict[Mesh, Measured] = {}
    for meshes in tqdm(MESHES, unit="number of processes", leave=False):
        measured |= measure(work, meshes, args.visits)
    on_gpu = Work(*args.gpu_work, args.steps)
    print(table(work, measured), "", sep="\n")
    print(projection(on_gpu, Rates(args.gpu_flops, args.gpu_latency, args.gpu_bandwidth)))


if __name__ == "__main__":
    main()
