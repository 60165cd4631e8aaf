"""The script that measures decoupled training beside backpropagation: tiny runs, and pages from known numbers."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytestmark = pytest.mark.cpu

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
MODULES = ("evidence", "experiments.plan", "experiments.problems", "experiments.measure", "experiments.results")
MODULES += ("experiments.statistics", "experiments.findings", "experiments.page")


@pytest.fixture(scope="module")
def ev():
    """The modules of the script, by the last parts of their names."""
    sys.path.insert(0, str(EXAMPLES))
    yield SimpleNamespace(**{name.split(".")[-1]: importlib.import_module(name) for name in MODULES})
    sys.path.remove(str(EXAMPLES))
    for name in [name for name in sys.modules if name.split(".")[0] in ("evidence", "experiments")]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def quick(ev, tmp_path_factory):
    """The folder that `--quick` has written."""
    folder, threads = tmp_path_factory.mktemp("evidence"), torch.get_num_threads()
    assert ev.evidence.main(["--quick", "--output", str(folder)]) == len(quick_runs(ev))
    yield folder
    torch.set_num_threads(threads)


def quick_runs(ev):
    return ev.plan.runs_of(tuple(map(ev.plan.quick, ev.plan.EXPERIMENTS)))


# ---------------------------------------------------------------------------------------------------------------------
# Tiny runs
# ---------------------------------------------------------------------------------------------------------------------


def test_every_run_is_stored_with_what_it_measured(ev, quick):
    results = ev.results.read(quick / "evidence" / "results.csv")
    assert [r.run for r in results] == quick_runs(ev)
    by_name = {name: [r for r in results if r.run.experiment == name] for name in ("depth", "scale", "gradient")}
    for r in by_name["depth"]:
        assert r.curve == (pytest.approx(r.score, abs=0.01),) and 30 < r.score <= 100  # guessing: 10
        assert math.isnan(r.validation_score) and r.loss > 0
        assert 0 < r.burn_in_seconds < r.seconds
    for r in by_name["scale"]:
        assert 0 <= r.validation_score <= 100
    (gradient,) = by_name["gradient"]
    assert len(gradient.cosine) == len(gradient.norm_ratio) == 4
    assert min(gradient.cosine) > 0.98 and 1 < max(gradient.norm_ratio) < 2
    for r in (r for r in results if r.run.experiment == "cost"):
        assert 0 < r.milliseconds < math.inf and 0 < r.backpropagation_milliseconds < math.inf
    (linear,) = (r for r in results if r.run.experiment == "linear")
    assert linear.relative_error[-1] < 1e-6 < linear.relative_error[-2] and linear.relative_error[0] > 0.1


def test_the_page_has_what_was_measured_and_says_what_was_not(ev, quick):
    page = (quick / "EVIDENCE.md").read_text()
    assert f"**{len(quick_runs(ev))} of {len(quick_runs(ev))} runs are in.**" in page
    pictures = {section.picture for section in ev.page.SECTIONS} - {"curves.png"}  # of 32 layers, not in a quick run
    for picture in pictures:
        assert f"(evidence/{picture})" in page
        assert (quick / "evidence" / picture).read_bytes().startswith(b"\x89PNG")
    assert "curves.png" not in page and page.count("*Not measured yet.*") == 1
    assert page.count("| not measured yet |") == 5  # goals, which are about 32 and 128 layers
    assert "nan" not in page


def test_what_is_stored_is_not_measured_again(ev, quick, capsys):
    path = quick / "evidence" / "results.csv"
    before = path.read_bytes()
    assert ev.evidence.main(["--quick", "--output", str(quick)]) == 0
    assert path.read_bytes() == before
    assert "0 runs made" in capsys.readouterr().out


def test_a_run_that_is_missing_is_made_with_the_same_numbers(ev, quick, tmp_path, monkeypatch):
    # threads for processes, each of which would load torch anew
    monkeypatch.setattr(ev.evidence, "ProcessPoolExecutor", lambda workers, context: ThreadPoolExecutor(workers))
    results = ev.results.read(quick / "evidence" / "results.csv")
    ev.results.append(tmp_path / "evidence" / "results.csv", results[1])
    options = ["--quick", "--only", "gradient", "--output", str(tmp_path)]
    for workers in ("1", "2"):
        assert ev.evidence.main([*options, "--budget-minutes", "0", "--workers", workers]) == 0
    assert ev.evidence.main([*options, "--report"]) == 0
    assert ev.evidence.main([*options, "--workers", "2"]) == 1
    other, again = ev.results.read(tmp_path / "evidence" / "results.csv")
    assert other == results[1] and again.run == results[0].run
    assert (again.cosine, again.norm_ratio) == (results[0].cosine, results[0].norm_ratio)


# ---------------------------------------------------------------------------------------------------------------------
# The plan
# ---------------------------------------------------------------------------------------------------------------------


def test_runs_are_in_the_order_of_their_seeds(ev):
    runs = ev.plan.runs_of(ev.plan.EXPERIMENTS)
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)
    assert len(set(runs)) == len(runs) and {run.seed for run in runs} == set(range(5))
    for seed in range(5):
        assert sum(run.seed == seed for run in runs) == len(runs) / 5


def test_every_mode_has_the_same_learning_rates_and_only_some_are_left_out(ev):
    runs = ev.plan.runs_of(ev.plan.EXPERIMENTS)
    scale = [run for run in runs if run.experiment == "scale"]
    per_mode = {mode: sum(run.mode == mode for run in scale) for mode in ("backpropagation", *ev.plan.STORED)}
    assert set(per_mode.values()) == {len(scale) / 3} and len({run.learning_rate for run in scale}) == 5
    depths = {run.layers for run in runs if run.experiment == "depth" and run.mode == "backpropagation"}
    reinitialized = {run.layers for run in runs if run.experiment == "depth" and run.mode == "reinitialized"}
    assert depths == {4, 8, 16, 32, 64, 128} and reinitialized == {4, 8, 16, 32}


@pytest.mark.parametrize(("name", "train", "test"), [("digits", 1437, 360), ("breast_cancer", 455, 114)])
def test_validation_samples_are_taken_from_those_for_training(ev, name, train, test):
    whole, split = (ev.problems.load(name, with_validation=validation) for validation in (False, True))
    assert len(whole.train.x) == train and len(whole.test.x) == len(split.test.x) == test
    assert len(split.train.x) + len(split.validation.x) == train
    assert torch.equal(whole.test.target, split.test.target) and whole.validation is None


def test_a_regression_is_standardized(ev):
    problem = ev.problems.load("friedman1", with_validation=False)
    assert problem.head == "squared" and problem.n_outputs == 1
    for values in (problem.train.x, problem.train.target):
        torch.testing.assert_close(values.mean(0), torch.zeros(values.shape[1]), atol=1e-6, rtol=0)
        torch.testing.assert_close(values.std(0, correction=0), torch.ones(values.shape[1]))


def test_scores(ev):
    class Fixed(torch.nn.Module):
        def __init__(self, output, head):
            super().__init__()
            self.output, self.head = torch.tensor(output), head

        def forward(self, x):
            return self.output

    def score(output, head, target):
        return ev.measure.score(Fixed(output, head), ev.problems.Samples(torch.zeros(4, 1), torch.tensor(target)))

    labels = [[2.0, 1.0], [0.0, 1.0], [5.0, 0.0], [1.0, 0.0]]
    assert score(labels, "softmax_infogain", [0, 1, 0, 1]) == 75
    target = [[0.0], [0.0], [2.0], [2.0]]  # of variance 1
    assert score([[0.0], [0.0], [2.0], [1.0]], "squared", target) == pytest.approx(75)
    assert score([[9.0], [0.0], [2.0], [1.0]], "squared", target) == 0
    assert score([[math.nan], [0.0], [2.0], [1.0]], "squared", target) == 0


# ---------------------------------------------------------------------------------------------------------------------
# Pages from numbers that are known
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def page_of(ev, tmp_path):
    """The page that `--report` makes of these results."""

    def write(*results):
        path = tmp_path / "evidence" / "results.csv"
        for result in results:
            ev.results.append(path, result)
        assert ev.evidence.main(["--report", "--output", str(tmp_path)]) == 0
        return (tmp_path / "EVIDENCE.md").read_text()

    return write


def result(ev, experiment, *, layers=32, mode, seed, rate=0.01, net="residual", **values):
    run = ev.plan.Run(experiment, "digits", net, layers, mode, rate, 60 if rate else 0, seed)
    if "score" in values:
        values |= {"curve": (values["score"] - 1,) * 59 + (values["score"],), "seconds": 30.0, "burn_in_seconds": 1.0}
    return ev.results.Result(run, "2026-01-01", "2.13.0", "AVX2", **values)


def scored(ev, mode, scores, **options):
    return [result(ev, "depth", mode=mode, seed=seed, score=score, **options) for seed, score in enumerate(scores)]


def test_means_errors_and_differences(ev, page_of):
    page = page_of(
        *scored(ev, "backpropagation", [98.0, 97.0, 96.0]),
        *scored(ev, "stored_multipliers", [97.0, 96.5, 95.0, 50.0]),  # no partner for the last one
        *scored(ev, "stored", [90.0]),
        *scored(ev, "reinitialized", [100.0, 98.6]),
    )
    # standard deviations 1, 23.1 and 0.99 over sqrt(3), sqrt(4) and sqrt(2)
    scores = "97.0 ± 0.6 (3) | 90.0 (1) | 84.6 ± 11.5 (4) | 99.3 ± 0.7 (2)"
    assert f"| digits | residual ReLU nets | 32 | {scores} |" in page
    assert "10 of 110 runs are in, of 4 of 5 seeds. 60 epochs, learning rate 0.01." in page
    assert "points below backpropagation | -0.8 points | 3 of 5 | met so far |" in page  # of -1, -0.5, -1
    worse, better = page.split("Decoupled modes more than 1 point below backpropagation:")[1].split("And those")
    assert worse.strip() == "- digits, residual ReLU nets, 32 layers, stored z: -8.0 points (1)"
    assert "- digits, residual ReLU nets, 32 layers, re-initialised z: +1.8 ± 0.2 points (2)" in better


def test_a_goal_is_met_when_all_seeds_are_in(ev, page_of):
    page = page_of(*scored(ev, "backpropagation", [98.0] * 5), *scored(ev, "stored_multipliers", [97.1] * 5))
    assert "| -0.9 points | 5 of 5 | met |" in page


def test_a_mode_that_is_left_out_is_not_called_missing(ev, page_of):
    page = page_of(*scored(ev, "backpropagation", [98.0], layers=64))
    assert "| 64 | 98.0 (1) | not measured yet | not measured yet | left out |" in page


def test_a_goal_is_missed_so_far(ev, page_of):
    page = page_of(*scored(ev, "backpropagation", [98.0]), *scored(ev, "stored_multipliers", [96.9]))
    assert "| -1.1 points | 1 of 5 | **missed** so far |" in page
    assert "stored z and multipliers: -1.1 points (1)" in page


def test_scores_at_the_same_epoch_and_at_the_same_second(ev, page_of):
    slow = [dataclasses.replace(r, seconds=61.0) for r in scored(ev, "stored", [90.0, 92.0])]
    slower = [
        dataclasses.replace(r, seconds=90.0, burn_in_seconds=30.5) for r in scored(ev, "stored_multipliers", [95.0])
    ]
    page = page_of(*scored(ev, "backpropagation", [98.0]), *slow, *slower)
    assert "| mode | CPU seconds | of it burn-in | score after 60 epochs | after 30 s |" in page
    assert "| backpropagation | 30 | 1.0 | 98.0 | 98.0 |" in page
    assert "| stored z | 61 | 1.0 | 91.0 ± 1.0 | 90.0 ± 1.0 |" in page  # then it was one point lower
    assert "| stored z and multipliers | 90 | 30.5 | 95.0 | no epoch yet |" in page


def test_the_worst_hidden_layer_of_all_seeds_decides(ev, page_of):
    others = (1.0,) * 29
    gradients = [((*others, 0.99, 0.96, 0.1), (*others, 1.9, 0.6, 9.0)), ((*others, 0.97, 1, 1), (*others, 1, 2.1, 1))]
    page = page_of(
        *(
            result(ev, "gradient", mode="reinitialized", seed=i, rate=0.0, cosine=c, norm_ratio=r)
            for i, (c, r) in enumerate(gradients)
        )
    )
    assert "| 32 | 0.960 | 0.60 | 2.10 | 2 |" in page
    assert "in every hidden layer | 0.960, the worst of all seeds | 2 of 5 | met so far |" in page
    assert "norm ratio at least 0.5 | 0.600, the worst of all seeds | 2 of 5 | met so far |" in page
    assert "norm ratio at most 2 | 2.100, the worst of all seeds | 2 of 5 | **missed** so far |" in page


def test_results_of_another_plan_do_not_count(ev, page_of):
    page = page_of(*scored(ev, "stored", [90.0], rate=0.5))
    assert "**0 of " in page and "90.0" not in page


def test_validation_samples_choose_the_learning_rate(ev, page_of):
    def tuned(mode, seed, scores_by_rate):
        return [
            result(ev, "scale", net="gain_3", mode=mode, seed=seed, rate=rate, score=score, validation_score=validation)
            for rate, (validation, score) in scores_by_rate.items()
        ]

    grid = dict.fromkeys(ev.plan.GRID, (10.0, 99.0))  # on the test samples all of them are better
    page = page_of(
        *tuned("backpropagation", 0, grid | {0.01: (80.0, 70.0), 0.001: (90.0, 40.0)}),
        *tuned("backpropagation", 1, grid | {0.01: (80.0, 72.0), 0.001: (60.0, 40.0)}),
        *tuned("stored", 0, {0.01: (80.0, 70.0)}),  # the others are not in
    )
    row = "| digits | tanh, weights at 3 times the scale | 32 | 71.0 ± 1.0 (2, rate 0.01) | not measured yet |"
    assert row in page


def test_a_page_without_results(ev, page_of):
    page = page_of()
    assert page.count("*Not measured yet.*") == len(ev.page.SECTIONS) + 2  # and the two lists at the end
    assert page.count("| not measured yet |") == 6 and "| met" not in page and "missed" not in page
    assert ".png" not in page


def test_another_file_is_refused(ev, tmp_path):
    path = tmp_path / "results.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerow(["experiment", "score"])
    with pytest.raises(ValueError, match=r"results.csv: has the columns \['experiment', 'score'\], expected"):
        ev.results.read(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--only", "width"), "argument --only: invalid choice: 'width'"),
        (("--workers", "0"), "argument --workers: must be at least 1, got 0"),
    ],
)
def test_refused_options(ev, capsys, options, message):
    with pytest.raises(SystemExit):
        ev.evidence.main(list(options))
    assert message in capsys.readouterr().err
