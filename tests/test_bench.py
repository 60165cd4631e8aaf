"""The benchmark harness: it refuses wrong results, keeps its records, and judges goals. Nothing here looks at times."""

from __future__ import annotations

import dataclasses
import re
import shutil
import sys
import types

import pytest
import torch

from bench import results, timing
from bench.__main__ import README, parse_arguments, run
from bench.correctness import check_peers, relative_error
from bench.floors import Rates, floor_ms
from bench.goals import AtLeast, AtMost, judge
from bench.machine import backend_of, describe_machine, device_slug, gpu_slug
from bench.measure import measure_problem, measure_workload
from bench.peers import Problem, decoupled_step, prepare, softmax_infogain
from bench.plot import draw, draw_depths, update_plots
from bench.report import report
from bench.results import RESULTS, Row
from bench.table import BEGIN, END, section, three_digits, update_readme, with_table
from bench.timing import CALLS_PER_BURST, LEAST_ROUNDS, summarize, time_interleaved
from bench.workloads import WORKLOADS, DecoupledStepWorkload, SoftmaxInfogainWorkload
from lgd_kernels import backends

pytestmark = pytest.mark.cpu

SECONDS = 0.0  # the least number of rounds
PEERS = ("copy", "eager", "ours")
TINY_NET = DecoupledStepWorkload(3, 8, 6, peers=("copy", "eager", "batched", "bmm", "ours"))
TINY = SoftmaxInfogainWorkload("dense", (6, 5), peers=PEERS, goals=(AtLeast("eager", 7), AtMost("copy", 1.6)))


def nothing(*_) -> None:
    pass


def tiny(workload):
    """The same with little data, on the CPU, and without the peers that take long to compile or need more layers."""
    if isinstance(workload, DecoupledStepWorkload):
        return dataclasses.replace(TINY_NET, dtype=workload.dtype, depth=min(workload.depth, 20))
    n_samples, n_classes, *inner = workload.shape
    shape = (min(n_samples, 4), min(n_classes, 50), *(3 for _ in inner))
    return dataclasses.replace(workload, shape=shape, peers=PEERS, device="cpu")


def row(peer: str, median_ms: float | None, workload: str = TINY.name, date: str = "2025-01-01", **changes) -> Row:
    status = "ok" if median_ms else "wrong: gradient off by 1.0e-02, allowed 1.0e-06"
    values = {
        "date": date,
        "commit": "0123456789ab",
        "device": "some-cpu-2-cores-avx2",
        "cpu": "Some, CPU",
        "isa": "AVX2",
        "threads": 2,
        "torch": "2.13.0+cpu",
        "python": "3.11.2",
        "lgd_kernels": "0.1.0",
        "backend": "cpp",
        "workload": workload,
        "peer": peer,
        "status": status,
        "error": 1.5e-7,
        "median_ms": median_ms,
        "p20_ms": median_ms,
        "p80_ms": median_ms,
        "calls": 12 if median_ms else None,
        "floor_ms": 1.25,
        "ratio_to_floor": median_ms and median_ms / 1.25,
        "copy_gb_per_s": 40.0,
        "gemm_gflop_per_s": 200.0,
        "other_cores": 0.02,
        "launches": None,
    }
    return Row(**(values | changes))


RUN = [row("copy", 1.25), row("eager", 16.0), row("compiled", 6.0), row("ours", 2.0)]


# ---------------------------------------------------------------------------------------------------------------------
# Workloads, peers, correctness
# ---------------------------------------------------------------------------------------------------------------------


def test_workloads_are_distinct_and_their_goals_name_their_peers():
    assert len({workload.name for workload in WORKLOADS}) == len(WORKLOADS)
    for workload in WORKLOADS:
        assert {goal.peer for goal in workload.goals} < set(workload.peers), workload.name


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.name)
def test_every_kind_of_workload_runs_and_its_peers_agree_with_float64(workload):
    small = tiny(workload)
    rows = measure_workload(small, SECONDS, describe_machine(), 1e11, nothing)
    assert [(r.peer, r.status) for r in rows] == [(peer, "ok") for peer in small.peers]
    assert all(r.median_ms > 0 and r.p20_ms <= r.median_ms <= r.p80_ms for r in rows)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize(("workload", "peers"), [(TINY, ["compiled"]), (TINY_NET, ["compiled", "bmm_compiled"])])
def test_the_compiled_peers_agree_with_float64(workload, peers):
    checks = check_peers(prepare(dataclasses.replace(workload, peers=tuple(peers))))
    for peer in peers:
        assert checks[peer].passed, checks[peer].status


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("output", ["z", "weight", "bias", "weight_by_backpropagation", "bias_by_backpropagation"])
def test_a_wrong_step_is_noticed(output, dtype):
    """In what a step changes, not in what was there before; with the tolerance of the largest nets."""
    workload = dataclasses.replace(TINY_NET, dtype=dtype, depth=32)
    expected, before = prepare(workload).expected()[output], decoupled_step.make_state(workload)
    before = getattr(before, output.split("_")[0]).double()
    assert relative_error(expected.value, expected) == 0
    assert expected.tolerance < (0.001 if dtype == "float32" else 0.3)
    for wrong in (before, before - (expected.value - before), before + 1.4 * (expected.value - before)):
        assert relative_error(wrong, expected) > expected.tolerance


def test_every_change_of_a_step_is_compared():
    """A momentum that is left out, a weight or bias that stays: what the second call shows."""
    problem = prepare(TINY_NET)
    assert problem.checked_calls == 2
    assert set(problem.calls["ours"]()) == set(problem.calls["bmm"]()) == {"z", "weight", "bias"}
    for peer in ("eager", "batched"):
        assert set(problem.calls[peer]()) == {"weight_by_backpropagation", "bias_by_backpropagation"}


@pytest.mark.parametrize("kind", ["identity", "dense", "sparse", "label_smoothing"])
@pytest.mark.parametrize("shape", [(7, 5), (2, 5, 3, 2)])
def test_expected_outputs_are_those_of_autograd_in_float64(kind, shape):
    data = softmax_infogain.make_data(SoftmaxInfogainWorkload(kind, shape, dtype="float64"))
    expected = softmax_infogain.expected_outputs(kind, data)
    matrix = torch.eye(5, dtype=torch.float64) if data.matrix is None else data.matrix.double()
    if kind == "label_smoothing":
        matrix = (1 - softmax_infogain.EPSILON) * matrix + softmax_infogain.EPSILON / 5
    targets = matrix[data.labels].movedim(-1, 1)
    loss = -(targets * data.logits.log_softmax(1)).sum() / data.labels.numel()
    loss.backward()
    assert relative_error(loss.detach(), expected["loss"]) < 1e-14
    assert relative_error(data.logits.grad, expected["gradient"]) < 1e-14


@pytest.fixture
def liger(monkeypatch):
    """A stand-in for liger-kernel: it writes the gradient over the logits."""

    class Overwriting(torch.autograd.Function):
        @staticmethod
        def forward(ctx, logits, labels):
            with torch.enable_grad():
                x = logits.detach().clone().requires_grad_()
                loss = torch.nn.functional.cross_entropy(x, labels)
            logits.data.copy_(torch.autograd.grad(loss, x)[0])
            ctx.gradient = logits.detach()
            return loss.detach()

        @staticmethod
        def backward(ctx, upstream):
            return ctx.gradient, None

    module = types.ModuleType("liger_kernel.transformers.cross_entropy")
    module.LigerCrossEntropyLoss = lambda label_smoothing: Overwriting.apply
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", types.ModuleType("liger_kernel.transformers"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(softmax_infogain, "is_there", lambda peer, workload: True)


def test_a_peer_that_overwrites_the_logits_has_its_own_every_time(liger):
    problem = prepare(dataclasses.replace(TINY, infogain="identity", peers=("liger", "ours")))
    for _ in range(2):
        assert all(check.passed for check in check_peers(problem).values())
    problem.calls["liger"]()
    not_restored = dataclasses.replace(problem, before_each_call=nothing)
    assert check_peers(not_restored)["liger"].status.startswith("wrong: loss off by")


def test_peers_that_this_machine_lacks_are_left_out():
    peers = ("copy", "liger", "cuda", "triton", "ours")
    assert tuple(prepare(dataclasses.replace(TINY, peers=peers)).calls) == ("copy", "ours")
    rows = [row("copy", 1.25), row("ours", 2.0)]
    assert "not on this machine: cuda, liger, triton" in report(rows, [dataclasses.replace(TINY, peers=peers)])


def test_a_forced_backend_answers_for_its_peer():
    with backends.force("reference"):
        seen = softmax_infogain._forced("auto", lambda: {"backend": backends.implementation("softmax_infogain", "cpu")})
    assert seen["backend"] is backends.implementation("softmax_infogain", "cpu")


def with_peer(change) -> Problem:
    """The tiny problem, with `change` applied to what lgd_kernels returns."""
    problem = prepare(TINY)
    ours = problem.calls["ours"]
    return dataclasses.replace(problem, calls=problem.calls | {"ours": lambda: change(ours())})


@pytest.mark.parametrize(
    ("change", "status"),
    [
        (lambda out: out | {"gradient": out["gradient"] * 1.001}, "wrong: gradient off by"),
        (lambda out: out | {"gradient": out["gradient"].where(out["gradient"] < 0, torch.nan)}, "wrong: gradient off"),
        (lambda out: out | {"gradient": None}, "wrong: gradient off by inf"),
        (lambda out: out | {"gradient": out["gradient"][:1]}, "wrong: gradient off by inf"),
        (lambda out: out | {"loss": out["loss"] + 1}, "wrong: loss off by"),
        (lambda out: 1 / 0, "failed: ZeroDivisionError: division by zero"),
    ],
    ids=["scaled", "nan", "missing", "misshapen", "loss", "raises"],
)
def test_a_wrong_peer_gets_no_time(change, status):
    measured = measure_problem(with_peer(change), SECONDS, nothing)
    assert measured.checks["ours"].status.startswith(status)
    assert set(measured.timings) == {"copy", "eager"}


def test_a_wrong_result_of_ours_gives_no_speed_up_anywhere(monkeypatch):
    problem = with_peer(lambda out: out | {"gradient": out["gradient"] * 1.001})
    monkeypatch.setattr("bench.measure.prepare", lambda workload: problem)
    rows = measure_workload(TINY, SECONDS, describe_machine(), 1e11, nothing)
    ours = rows[-1]
    assert (ours.median_ms, ours.p20_ms, ours.p80_ms, ours.calls, ours.ratio_to_floor) == (None,) * 5
    assert ours.error > 1e-4
    for text in (report(rows, [TINY]), section(rows, [TINY])):
        assert not re.search(r"\d\.\d+x( as fast|\))", text)
        assert text.count("not measured") == len(TINY.goals)
    assert "not timed: ours on softmax_infogain/dense/6x5/float32: wrong" in report(rows, [TINY])


# ---------------------------------------------------------------------------------------------------------------------
# The timing loop and the floors
# ---------------------------------------------------------------------------------------------------------------------


def test_peers_take_turns_and_each_call_is_prepared():
    log, rounds = [], []
    calls = {peer: lambda peer=peer: log.append(peer) for peer in "abc"}
    timings = time_interleaved(calls, lambda: log.append("|"), 0.0, rounds.append)
    assert rounds == [1 / LEAST_ROUNDS] * LEAST_ROUNDS
    assert log[::2] == ["|"] * (len(log) // 2)
    order = ["abc", "abc", "bca", "cab"]  # warm-up, then one more peer ahead in every round
    assert "".join(log[1::2]) == "".join(peer * CALLS_PER_BURST for peers in order for peer in peers)
    assert all(timing.calls == LEAST_ROUNDS * (CALLS_PER_BURST - 1) for timing in timings.values())


def test_the_clock_of_a_gpu_runs_between_two_events_with_a_cold_cache_and_the_host_ahead(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")

        def synchronize(self):
            log.append("wait")

        def elapsed_time(self, end):
            return 250.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("busy"), raising=False)
    monkeypatch.setattr(timing, "_filler", lambda: types.SimpleNamespace(sum=lambda: log.append("fill the cache")))
    assert timing.seconds_on_gpu(lambda: log.append("call")) == 0.25
    assert log == ["fill the cache", "busy", "event", "call", "event", "wait"]


def test_a_problem_is_timed_by_the_clock_of_its_device(monkeypatch):
    monkeypatch.setitem(timing.CLOCKS, "cuda", lambda call: call() and 0.5)
    monkeypatch.setattr("bench.measure.launches_of", lambda call: 3)
    measured = measure_problem(dataclasses.replace(prepare(TINY), device="cuda"), SECONDS, nothing)
    assert {t.median_ms for t in measured.timings.values()} == {500.0}
    assert measured.other_cores is None  # the CPU's business
    assert set(measured.launches.values()) == {3}


def test_summary_of_times():
    timing = summarize([0.001 * i for i in range(11)])
    assert (timing.median_ms, timing.p20_ms, timing.p80_ms, timing.calls) == pytest.approx((5, 2, 8, 11))


def test_the_floor_is_the_slower_of_bytes_and_flops():
    problem = dataclasses.replace(prepare(TINY), least_bytes=2_000, flops=3_000)
    assert floor_ms(problem, Rates(1e6, 1e9)) == pytest.approx(2.0)
    assert floor_ms(problem, Rates(1e9, 1e6)) == pytest.approx(3.0)


def test_least_bytes_are_two_passes_over_the_logits_and_one_over_H():
    assert prepare(TINY).least_bytes == 2 * 6 * 5 * 4 + 5 * 5 * 4


def test_of_a_large_H_only_the_rows_of_the_labels_must_be_read():
    few = dataclasses.replace(TINY, shape=(2, 5))
    assert prepare(few).least_bytes == 2 * 2 * 5 * 4 + 2 * 5 * 4


# ---------------------------------------------------------------------------------------------------------------------
# Goals
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("goal", "ours", "peer", "ratio", "met"),
    [
        (AtLeast("eager", 7), 2.0, 14.0, 7.0, True),
        (AtLeast("eager", 7), 2.0, 13.9, 6.95, False),
        (AtMost("copy", 1.6), 1.6, 1.0, 1.6, True),
        (AtMost("copy", 1.6), 1.7, 1.0, 1.7, False),
    ],
)
def test_goals(goal, ours, peer, ratio, met):
    (verdict,) = judge((goal,), {"ours": ours, goal.peer: peer})
    assert verdict.ratio == pytest.approx(ratio) and verdict.met is met
    assert verdict.word == ("met" if met else "MISSED")


@pytest.mark.parametrize("median_ms", [{"ours": 1.0}, {"eager": 1.0}])
def test_a_goal_without_both_times_is_neither_met_nor_missed(median_ms):
    (verdict,) = judge((AtLeast("eager", 7),), median_ms)
    assert (verdict.ratio, verdict.met, verdict.word) == (None, None, "not measured")


def test_report_shows_launches_where_there_are_any():
    lines = report([row("copy", 1.25, launches=1), row("ours", 2.0, launches=17)], [TINY]).splitlines()
    header = next(i for i, line in enumerate(lines) if "median ms" in line)
    assert lines[header].endswith("launches") and lines[header + 2].endswith("17")
    assert "launches" not in report(RUN, [TINY])


def test_report_says_which_goals_are_met_and_whether_the_machine_was_busy():
    text = report([*RUN[:3], row("ours", 2.1)], [TINY])
    assert "goal met           ≥ 7x as fast as eager: 7.62" in text
    assert "goal MISSED        ≤ 1.6x the time of copy: 1.68" in text
    assert "1 of 2 goals met" in text
    assert "DO NOT TRUST" not in text and "busy" not in section(RUN, [TINY])
    busy = [row("copy", 1.0, other_cores=None), row("ours", 2.1, other_cores=1.04)]
    assert report(busy, [TINY]).endswith("DO NOT TRUST THESE TIMES: other processes kept up to 1.0 cores busy")
    assert "**Measured while other processes kept up to 1.0 cores busy.**" in section(busy, [TINY])


# ---------------------------------------------------------------------------------------------------------------------
# Results, table, picture
# ---------------------------------------------------------------------------------------------------------------------


def test_results_come_back_from_the_file_and_the_latest_run_is_read(tmp_path):
    path = tmp_path / "results" / "some.csv"
    results.append(path, RUN)
    second = [row("copy", 1.0, date="2025-01-02"), row("ours", None, date="2025-01-02")]
    results.append(path, second)
    assert results.read_latest_run(path) == second
    assert path.read_text().count("date,commit,device") == 1
    assert len(path.read_text().splitlines()) == 1 + len(RUN) + len(second)


def test_results_of_another_version_are_not_mixed_in(tmp_path):
    path = tmp_path / "some.csv"
    path.write_text("date,peer\n2025-01-01,ours\n")
    with pytest.raises(ValueError, match=r"some\.csv: has the columns \['date', 'peer'\]"):
        results.append(path, RUN)


def test_the_table_goes_between_the_markers(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.table.WORKLOADS", (TINY,))
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n", encoding="utf-8")
    results.append(tmp_path / "some.csv", RUN)
    update_readme(readme, tmp_path)
    text = readme.read_text(encoding="utf-8")
    assert text.startswith(f"before\n{BEGIN}\n**Some, CPU, 2 threads, AVX2**") and text.endswith(f"\n{END}\nafter\n")
    assert "| dense H, 6 x 5 | 1.25 | 16.0 (8.0x) | 6.00 (3.0x) | **2.00** | 1.60 |" in text
    assert "| ≥ 7x PyTorch eager: 8.00 ✓; ≤ 1.6x copy of the logits: 1.60 ✓ |" in text
    assert "old" not in text
    update_readme(readme, tmp_path)
    assert readme.read_text(encoding="utf-8") == text


@pytest.mark.parametrize("text", ["", BEGIN, END, f"{END}\n{BEGIN}", f"{BEGIN}{BEGIN}{END}"])
def test_missing_markers_are_said_clearly(text):
    with pytest.raises(ValueError, match=r"README\.md: needs one line <!-- bench:begin --> and after it one line"):
        with_table(text, "table", "README.md")


GPU = SoftmaxInfogainWorkload(
    "identity", (2048, 131072), "bfloat16", (AtMost("copy", 1.11), AtLeast("liger", 1)), device="cuda"
)
H200 = {"device": "nvidia-h200", "cpu": "NVIDIA H200", "isa": "sm_90, CUDA 13.0, driver 580.1", "threads": 0}


def gpu_row(peer: str, median_ms: float, **changes) -> Row:
    return row(peer, median_ms, GPU.name, **H200, other_cores=None, **changes)


def test_a_gpu_has_a_section_and_a_picture_of_its_own(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("bench.table.WORKLOADS", (TINY, GPU))
    monkeypatch.setattr("bench.plot.WORKLOADS", (TINY, GPU))
    run = [gpu_row("copy", 0.25), gpu_row("eager", 0.75), gpu_row("cuda", 0.26), gpu_row("ours", 0.26)]
    results.append(tmp_path / "some-cpu.csv", RUN)
    results.append(tmp_path / "nvidia-h200.csv", run)
    (tmp_path / "README.md").write_text(f"{BEGIN}\n{END}\n")
    update_readme(tmp_path / "README.md", tmp_path)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "**NVIDIA H200, sm_90, CUDA 13.0, driver 580.1** (torch" in text
    assert "| loss + gradient | copy of the logits | PyTorch eager | lgd_kernels, CUDA C++ | lgd_kernels |" in text
    assert "≤ 1.11x copy of the logits: 1.04 ✓; ≥ 1x liger-kernel not measured" in text
    assert text.count("Some, CPU, 2 threads, AVX2") == 1 and "nvidia-h200-softmax_infogain.png" in text
    update_plots(tmp_path)
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "some-cpu-2-cores-avx2-softmax_infogain.png",
        "nvidia-h200-softmax_infogain.png",
    }


@pytest.fixture
def fake_gpu(monkeypatch, tmp_path):
    """`python -m bench --device cuda` with made-up measurements: of the workloads, the second and the last fail."""
    (tmp_path / "README.md").write_text(f"{BEGIN}\n{END}\n")
    workloads = [dataclasses.replace(GPU, shape=(2, n_classes)) for n_classes in (1, 2, 3, 4)]

    def measured(workload, seconds, machine, gemm_rate, after_each_round):
        if workload == workloads[1]:
            raise torch.OutOfMemoryError("CUDA out of memory.\nA long explanation")
        if workload == workloads[3]:
            raise KeyboardInterrupt
        return [dataclasses.replace(gpu_row(peer, 1.0), workload=workload.name) for peer in ("copy", "ours")]

    for where in ("bench.__main__", "bench.table", "bench.plot"):
        monkeypatch.setattr(f"{where}.WORKLOADS", (*workloads, TINY))
    monkeypatch.setattr("bench.__main__.RESULTS", tmp_path)
    monkeypatch.setattr("bench.__main__.README", tmp_path / "README.md")
    monkeypatch.setattr("bench.__main__.measure_workload", measured)
    monkeypatch.setattr("bench.__main__.describe_machine", lambda device: None)
    monkeypatch.setattr("bench.__main__.measure_gemm_rate", lambda device: 1e14)
    return tmp_path, workloads


def test_what_was_measured_on_a_gpu_stays_when_the_rest_fails_or_is_stopped(fake_gpu, capsys):
    folder, workloads = fake_gpu
    assert run("cuda", only="", quick=False) == 1
    kept = results.read_latest_run(folder / "nvidia-h200.csv")
    assert {r.workload for r in kept} == {workloads[0].name, workloads[2].name}
    assert "NVIDIA H200" in (folder / "README.md").read_text(encoding="utf-8")
    printed = capsys.readouterr().out
    assert f"not measured: {workloads[1].name}: OutOfMemoryError: CUDA out of memory.\n" in printed
    assert "not measured: stopped after 2 of 4 workloads" in printed


@pytest.mark.parametrize(("only", "quick"), [("2x", False), ("", True)], ids=["only", "quick"])
def test_a_part_of_a_run_writes_nothing(fake_gpu, only, quick):
    folder, _ = fake_gpu
    run("cuda", only, quick)
    assert not list(folder.glob("*.csv"))


def test_missing_readme_and_missing_results_are_said_clearly(tmp_path):
    with pytest.raises(ValueError, match=r"README\.md: not found"):
        update_readme(tmp_path / "README.md", tmp_path)
    (tmp_path / "README.md").write_text(f"{BEGIN}\n{END}\n")
    with pytest.raises(ValueError, match="no results yet: run `python -m bench` first"):
        update_readme(tmp_path / "README.md", tmp_path)


def test_the_readme_in_this_checkout_holds_the_generated_table(tmp_path):
    if not list(RESULTS.glob("*.csv")) or not README.exists():
        pytest.skip("no results in this checkout")
    copy = tmp_path / "README.md"
    copy.write_text(README.read_text(encoding="utf-8"), encoding="utf-8")
    update_readme(copy, RESULTS)
    assert copy.read_text(encoding="utf-8") == README.read_text(encoding="utf-8"), "run `python -m bench table`"


@pytest.mark.parametrize(
    ("value", "text"), [(0.0312, "0.0312"), (0.5, "0.5"), (1.6, "1.60"), (14.64, "14.6"), (144.4, "144")]
)
def test_three_digits(value, text):
    assert three_digits(value) == text


def test_the_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    draw([*RUN[:2], row("ours", None)], [TINY], tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


def test_time_against_depth_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    sweep = [workload for workload in WORKLOADS if isinstance(workload, DecoupledStepWorkload) and workload.is_sweep]
    rows = [row(peer, 2.0, workload=workload.name) for workload in sweep for peer in ("eager", "ours")]
    draw_depths([*rows[:-1], row("ours", None, workload=sweep[-1].name)], sweep, tmp_path / "depth.png")
    assert (tmp_path / "depth.png").read_bytes().startswith(b"\x89PNG")


def test_the_section_of_a_device_has_a_table_and_a_picture_for_every_operation():
    run = [*RUN, row("copy", 1.0, workload=TINY_NET.name), row("ours", 2.0, workload=TINY_NET.name)]
    text = section(run, [TINY, TINY_NET])
    assert "| loss + gradient | copy of the logits |" in text and "| one step of training | copy of z |" in text
    for name in ("softmax_infogain", "decoupled_step"):
        assert f"(bench/results/some-cpu-2-cores-avx2-{name}.png)" in text
    assert "depth.png" not in text


# ---------------------------------------------------------------------------------------------------------------------
# The machine and the command line
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cpu", "n_cores", "isa", "slug"),
    [
        ("AMD EPYC", 2, "AVX512", "amd-epyc-2-cores-avx512"),
        ("Intel(R) Xeon(R) Platinum 8375C CPU @ 2.90GHz", 1, "AVX2", "intel-xeon-platinum-8375c-1-core-avx2"),
        ("AMD Ryzen 9 7950X 16-Core Processor", 32, "AVX512", "amd-ryzen-9-7950x-32-cores-avx512"),
    ],
)
def test_device_slug(cpu, n_cores, isa, slug):
    assert device_slug(cpu, n_cores, isa) == slug


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("NVIDIA H200", "nvidia-h200"),
        ("NVIDIA A100-SXM4-80GB", "nvidia-a100-sxm4-80gb"),
        ("NVIDIA GeForce RTX 4090", "nvidia-geforce-rtx-4090"),
    ],
)
def test_gpu_slug(name, slug):
    assert gpu_slug(name) == slug


def test_a_gpu_is_described(monkeypatch):
    properties = types.SimpleNamespace(name="NVIDIA H200", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr("bench.machine._output_of", lambda *command: "580.159.04\n580.159.04")
    machine = describe_machine("cuda")
    assert (machine.device, machine.cpu, machine.threads) == ("nvidia-h200", "NVIDIA H200", 0)
    assert re.fullmatch(r"sm_90, CUDA \S+, driver 580\.159\.04, Triton \S+", machine.isa)


def test_the_backend_that_answers_is_named():
    assert backend_of("softmax_infogain") == ("reference" if backends.extension is None else "cpp")
    with backends.force("reference"):
        assert backend_of("softmax_infogain", "cuda") == "reference"
    with backends.force("triton"):
        assert backend_of("softmax_infogain", "cuda") == "triton"


def test_the_command_line_says_what_it_cannot_do(capsys):
    for arguments, message in (
        (["--only", "no-such"], "no workload has this in its name"),
        (["plot", "--quick"], "run"),
        (["--only", "columns", "--device", "cuda"], "softmax_infogain/identity/268435x1000/bfloat16/cuda"),
    ):
        with pytest.raises(SystemExit):
            parse_arguments(arguments)
        assert message in capsys.readouterr().err
