"""`make gpu` as far as it goes without a GPU: its stages, their limits of time, and how it reads what they print."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from tools.gpu import __main__ as program
from tools.gpu import benchmark, build, commands, sanitizer, stages, tests
from tools.gpu.commands import Ended
from tools.gpu.stages import FAILED, PASSED, SKIPPED, STOPPED, Outcome, Stage, run_stages, succeeded, table

pytestmark = pytest.mark.cpu
OK = Outcome(PASSED, "fine")


@pytest.fixture(autouse=True)
def _logs_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(commands, "FOLDER", tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------------------------------------


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_command_is_shown_and_kept(tmp_path, capsys):
    code = "import os, sys; print(os.environ['COLOUR']); print('late', file=sys.stderr); sys.exit(3)"
    ended = commands.run("some", python(code), 60, COLOUR="blue")
    assert ended == Ended(3, "blue\nlate\n")
    assert (tmp_path / "some.log").read_text() == capsys.readouterr().out == "blue\nlate\n"


@pytest.mark.parametrize("stubborn", [False, True], ids=["", "stubborn"])
def test_a_command_is_stopped_when_its_time_is_over_with_what_it_started(stubborn, monkeypatch):
    monkeypatch.setattr(commands, "GRACE", 0.5)
    code = "import signal, subprocess, sys\n"
    code += "signal.signal(signal.SIGINT, signal.SIG_IGN)\n" if stubborn else ""
    code += "subprocess.run([sys.executable, '-c', 'import signal; signal.pause()'])"
    together = commands.run_together({"waits": python(code), "ends": python("print('done')")}, 3.0)
    assert together["waits"].status is None
    assert together["ends"] == Ended(0, "done\n")


# ---------------------------------------------------------------------------------------------------------------------
# Stages
# ---------------------------------------------------------------------------------------------------------------------


class Clock:
    """Time that passes only when a stage takes it."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def taking(clock: Clock, seconds: float, outcome=OK, given: list | None = None):
    def run(allowed: float) -> Outcome:
        if given is not None:
            given.append(allowed)
        clock.now += min(seconds, allowed)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    return run


def test_the_last_stage_gets_the_time_that_the_others_leave(tmp_path):
    clock, given = Clock(), []
    all_of_them = [
        Stage("build", 100, taking(clock, 20, given=given)),
        Stage("tests", 150, taking(clock, 500, given=given)),
        Stage("benchmark", float("inf"), taking(clock, 500, given=given)),
        Stage("too late", 10, taking(clock, 1, given=given)),
    ]
    finished = run_stages(all_of_them, 520, tmp_path / "summary.txt", clock)
    assert given == [100, 150, 350]
    assert clock.now == 520
    assert [f.seconds for f in finished] == [20, 150, 350, 0]
    assert finished[-1].outcome == Outcome(STOPPED, "no time was left")
    assert not succeeded(finished)


def test_a_stage_that_breaks_does_not_stop_the_others(tmp_path):
    clock = Clock()
    all_of_them = [
        Stage("build", 100, taking(clock, 1, ZeroDivisionError("by zero"))),
        Stage("tests", 100, taking(clock, 1)),
    ]
    finished = run_stages(all_of_them, 520, tmp_path / "summary.txt", clock)
    assert [f.outcome.result for f in finished] == [FAILED, PASSED]
    assert "ZeroDivisionError: by zero" in (tmp_path / "summary.txt").read_text()


def test_after_an_interrupt_the_rest_is_left_out(tmp_path):
    clock, given = Clock(), []
    all_of_them = [
        Stage("build", 100, taking(clock, 1)),
        Stage("tests", 100, taking(clock, 7, KeyboardInterrupt())),
        Stage("benchmark", 100, taking(clock, 1, given=given)),
    ]
    finished = run_stages(all_of_them, 520, tmp_path / "summary.txt", clock)
    assert not given
    assert [f.outcome.result for f in finished] == [PASSED, STOPPED, STOPPED]
    assert (tmp_path / "summary.txt").read_text() == table(finished) + "\n"
    assert "tests               STOPPED         7   interrupted" in table(finished)


def test_skipped_is_no_failure():
    finished = [stages.Finished("a", OK, 1.0), stages.Finished("b", Outcome(SKIPPED, "not there"), 0.0)]
    assert succeeded(finished)


@pytest.mark.parametrize(("quick", "minutes"), [(False, 9), (True, 3)])
def test_all_stages_fit_into_the_minutes_that_are_promised(quick, minutes):
    limits = [stage.seconds for stage in program.stages(quick)]
    total = program.QUICK_SECONDS if quick else program.FULL_SECONDS
    assert total + commands.GRACE < 60 * minutes
    assert sum(limits[:-1]) + 25 < total  # the benchmark gets somewhere even if all others take all of theirs


def test_without_a_device_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["tools.gpu"])
    assert program.main() == 1
    assert "make gpu needs a CUDA device, and torch" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# What the stages make of what they are told
# ---------------------------------------------------------------------------------------------------------------------


def answering(monkeypatch, module, answers):
    monkeypatch.setattr(module, "run", lambda name, command, seconds: answers[name])


@pytest.mark.parametrize(
    ("built", "backends", "result"),
    [
        (Ended(0, ""), Ended(0, "CUDA kernels        yes: for sm_90\nTriton yes"), PASSED),
        (Ended(0, ""), Ended(0, "CUDA kernels        no: nvcc was not found"), FAILED),
        (Ended(0, ""), Ended(1, "ImportError"), FAILED),
        (Ended(1, "error"), None, FAILED),
        (Ended(None, ""), None, STOPPED),
    ],
)
def test_a_build_is_one_with_cuda_kernels(monkeypatch, built, backends, result):
    answering(monkeypatch, build, {"build": built, "backends": backends})
    assert build.build(60).result == result


def test_the_build_reads_what_show_backends_prints():
    shown = commands.run("backends", build.SHOW_BACKENDS, 60)
    assert shown.status == 0
    assert "CUDA kernels  " in shown.output


FULL = (
    "....\n=== short test summary info ===\nFAILED tests/test_a.py::test_b[x] - assert\n1 failed, 20 passed in 3.10s\n"
)
GREEN = "...\n120 passed, 3 skipped, 40 deselected, 2 warnings in 61.45s (0:01:01)\n"
CUT = "...\n!!! KeyboardInterrupt !!!\n7 passed in 60.00s\n"


@pytest.mark.parametrize(
    ("ended", "result", "details"),
    [
        ([Ended(0, GREEN), Ended(5, "2 deselected in 0.5s")], PASSED, "120 passed, 3 skipped;"),
        ([Ended(0, GREEN), Ended(1, FULL)], FAILED, "140 passed, 1 failed, 3 skipped;"),
        ([Ended(0, GREEN), Ended(None, CUT)], STOPPED, "127 passed, 3 skipped;"),
        ([Ended(None, FULL), Ended(None, CUT)], FAILED, "27 passed, 1 failed;"),
        ([Ended(4, "usage: pytest")], FAILED, "no test ended;"),
        ([Ended(5, "no tests ran in 0.01s")], FAILED, "no test ended;"),
        ([Ended(1, "1 error in 0.5s")], FAILED, "1 error;"),
    ],
)
def test_the_shares_of_the_tests_are_judged_together(ended, result, details):
    outcome = tests.judged(ended)
    assert outcome.result == result
    assert outcome.details.startswith(details)


def test_failures_are_named():
    assert tests.failures([Ended(0, GREEN), Ended(1, FULL)]) == ["FAILED tests/test_a.py::test_b[x] - assert"]


def test_the_shares_are_all_of_the_tests_each_once():
    of_one_file = ["tests/test_losses.py", "--collect-only", "--device=cpu"]
    collecting = {name: [*command, *of_one_file] for name, command in tests.commands(2, quick=False).items()}
    collecting["all"] = [sys.executable, "-m", "pytest", *of_one_file]
    found = {
        name: [line for line in ended.output.splitlines() if "::" in line]
        for name, ended in commands.run_together(collecting, 120).items()
    }
    everything = found.pop("all")
    assert len(everything) > 100
    assert sorted(line for lines in found.values() for line in lines) == sorted(everything)


def test_compute_sanitizer_is_found_where_cuda_is(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    program = tmp_path / "bin" / "compute-sanitizer"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert sanitizer.find() == str(program)


def test_without_compute_sanitizer_that_stage_is_skipped(monkeypatch):
    monkeypatch.setattr(sanitizer, "find", lambda: None)
    assert sanitizer.sanitizer(60).result == SKIPPED


@pytest.mark.parametrize(("tool", "filtered"), [("memcheck", True), ("initcheck", False)])
def test_only_our_kernels_are_checked_where_that_is_enough(tool, filtered):
    command = sanitizer.command("compute-sanitizer", tool, "cuda", "layers")
    assert ("kns=lgd3gpu" in command) == filtered
    assert command.index("--tool") < command.index(sys.executable) < command.index("--backend=cuda")


@pytest.mark.parametrize("subject", sanitizer.SUBJECTS)
def test_compute_sanitizer_gets_tests_that_there_are(subject):
    files, expression = sanitizer.SUBJECTS[subject]
    tests = re.findall(r"def (test_\w+)", "".join((Path(__file__).parent / name).read_text() for name in files))
    for part in expression.split(" or "):
        assert any(part in test for test in tests), part


def test_the_name_that_kernels_are_filtered_by_is_that_of_their_namespace():
    source = Path(__file__).parent.parent / "csrc" / "cuda" / "softmax_infogain.cu"
    assert "namespace lgd::gpu {" in source.read_text()
    assert sanitizer.OUR_NAMESPACE == "lgd3gpu"  # as _ZN3lgd3gpu


@pytest.mark.parametrize(
    ("statuses", "result", "word"),
    [
        ((0, 0), PASSED, "racecheck: no report"),
        ((0, sanitizer.REPORTED), FAILED, "racecheck: REPORTS"),
        ((None, 1), FAILED, "racecheck: failing tests"),
        ((0, None), STOPPED, "racecheck: not done"),
    ],
)
def test_the_tools_of_compute_sanitizer_are_judged_together(statuses, result, word):
    outcome = sanitizer.judged({"memcheck": Ended(statuses[0], ""), "racecheck": Ended(statuses[1], "")})
    assert outcome.result == result
    assert word in outcome.details


@pytest.mark.parametrize(
    ("ended", "result", "details"),
    [
        (Ended(0, "…\n30 of 40 goals met\nnot on this machine: liger\n"), PASSED, "30 of 40 goals met, see"),
        (Ended(1, "5 of 9 goals met\nnot timed: ours on x: wrong\n"), FAILED, "5 of 9 goals met, 1 not measured, see"),
        (
            Ended(None, "0 of 2 goals met\nnot measured: stopped after 1\n"),
            STOPPED,
            "0 of 2 goals met, 1 not measured,",
        ),
        (Ended(2, "usage: python -m bench"), FAILED, "see build/gpu/bench.log"),
    ],
)
def test_the_benchmark_is_judged_by_its_report(ended, result, details):
    outcome = benchmark.judged(ended)
    assert outcome.result == result
    assert outcome.details.startswith(details)
