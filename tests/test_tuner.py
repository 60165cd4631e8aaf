"""`make tune` without a GPU: which tiles it chooses when it is told their times, its table, and who reads that."""

from __future__ import annotations

import dataclasses
import inspect
import json
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from bench import timing
from bench.peers import Expected, Problem
from lgd_kernels.triton_kernels import decoupled_linear, layers, linear_launches, tile_table
from lgd_kernels.triton_kernels.linear_tiles import LinearTiles, counted_tiles, linear_tiles
from lgd_kernels.triton_kernels.tile_table import Entry, ProductClass, Table, path_of, read_table, write_table
from tools.gates.triton_ahead_of_time import Report
from tools.gates.triton_launches import recorded
from tools.gates.triton_layers import SHARED_MEMORY, layer_variants, variants_of
from tools.gpu import tile_trials, tune
from tools.gpu.tile_trials import candidates, name_of, why_refused

pytestmark = pytest.mark.cpu
PRODUCT = ProductClass(rows=128, columns=64, widest=2, precision="half", architecture=90, even=True)
OTHER = dataclasses.replace(PRODUCT, rows=1024)
MACHINE = Table("Some GPU", "2.13.0", "3.6.0", "0123456789ab", [])
ODD = LinearTiles(rows=32, columns=16, depth=32, parts=2, num_warps=2, num_stages=1, registers=77, descriptors=False)
SIZE = tile_trials.SIZES[0]


@pytest.fixture(autouse=True)
def _tables_elsewhere(tmp_path, monkeypatch):
    """Tables in a folder of this test alone, and times as they are given."""
    monkeypatch.setattr(tile_table, "FOLDER", tmp_path / "tiles")
    monkeypatch.setattr(tune, "SECONDS_PER_CLASS", 0.0)
    monkeypatch.setitem(timing.CLOCKS, "cpu", given_seconds)
    tile_table.measured_tiles.cache_clear()
    yield
    tile_table.measured_tiles.cache_clear()


def given_seconds(call) -> float:
    call()
    return call.seconds


class Steps:
    """Of which every call says how long it takes, and some are wrong."""

    label = "some steps"

    def __init__(self, products, seconds, wrong=()):
        self._products, self._seconds, self._wrong, self.ran = products, seconds, wrong, set()

    def products(self):
        return self._products

    def problem(self, product, tried):
        calls = {name_of(tiles): self._call(tiles) for tiles in tried}
        one = torch.ones(3, dtype=torch.float64)
        return Problem(calls, lambda: None, lambda: {"z": Expected(one, one, 1e-3)}, 0, 0, 0)

    def _call(self, tiles):
        def call():
            self.ran.add(tiles)
            return {"z": torch.full((3,), float("nan") if tiles in self._wrong else 1.0005)}

        call.seconds = self._seconds[tiles]
        return call


def tuned(steps, reasons=None, seconds=100.0, clock=lambda: 0.0, table=MACHINE):
    """What `tune` returns for these steps of one size; reasons: against tiles."""

    def reasons_against(product, tried):
        return [(reasons or {}).get(tiles) for tiles in tried]

    return tune.tune(path_of(90), table, [SIZE], seconds, lambda size: steps, reasons_against, clock)


def seconds_of(product=PRODUCT):
    """For all candidates: the later, the faster."""
    return {tiles: 1.0 / (1 + i) for i, tiles in enumerate(candidates(product))}


# ---------------------------------------------------------------------------------------------------------------------
# Choosing
# ---------------------------------------------------------------------------------------------------------------------


def test_the_fastest_of_those_that_are_right_and_do_not_spill(capsys):
    seconds = seconds_of()
    *_, third, second, first = seconds
    steps = Steps([PRODUCT], seconds, wrong=[first])
    assert tuned(steps, {second: "step_forward: spills, 8 bytes of stack"})
    (entry,) = read_table(path_of(90)).entries
    default = counted_tiles(100, 50, 2, "half", 90)
    assert (entry.product, entry.tiles, entry.step) == (PRODUCT, third, "some steps")
    assert entry.median_ms == pytest.approx(1e3 * seconds[third])
    assert entry.default_ms == pytest.approx(1e3 * seconds[default])
    assert entry.error == pytest.approx(5e-4, rel=1e-3)
    assert steps.ran == set(seconds) - {second}
    printed = capsys.readouterr().out
    assert f"{name_of(first)}: wrong: z off by nan, allowed 1.0e-03" in printed
    assert f"{name_of(second)}: step_forward: spills, 8 bytes of stack" in printed


def test_the_default_is_kept_where_it_is_the_fastest():
    seconds = {tiles: 1.0 + i for i, tiles in enumerate(candidates(PRODUCT))}
    assert tuned(Steps([PRODUCT], seconds))
    (entry,) = read_table(path_of(90)).entries
    assert entry.tiles == counted_tiles(100, 50, 2, "half", 90) and entry.median_ms == entry.default_ms == 1e3


def test_no_entry_where_the_default_is_wrong_or_nothing_passes():
    seconds = seconds_of()
    assert tuned(Steps([PRODUCT], seconds, wrong=[counted_tiles(100, 50, 2, "half", 90)]))
    assert tuned(Steps([PRODUCT], seconds), dict.fromkeys(seconds, "spills"))
    assert not path_of(90).exists()


def test_a_default_that_spills_is_compared_with_and_not_chosen(capsys):
    default, second, *rest = candidates(PRODUCT)
    seconds = {default: 1.0, second: 2.0} | dict.fromkeys(rest, 3.0)
    assert tuned(Steps([PRODUCT], seconds), {default: "spills"})
    (entry,) = read_table(path_of(90)).entries
    assert (entry.tiles, entry.median_ms, entry.default_ms) == (second, 2e3, 1e3)
    assert f"{name_of(default)}: spills; 1000.0000 ms, off by 5.0e-04" in capsys.readouterr().out


def test_a_stopped_run_keeps_what_it_has_and_the_next_one_goes_on():
    def stopping(product, tried):
        if product == OTHER:
            raise KeyboardInterrupt
        return [None] * len(tried)

    steps = Steps([PRODUCT, OTHER], seconds_of() | seconds_of(OTHER))
    with pytest.raises(KeyboardInterrupt):
        tune.tune(path_of(90), MACHINE, [SIZE], 100.0, lambda size: steps, stopping)
    before = read_table(path_of(90))
    assert [entry.product for entry in before.entries] == [PRODUCT]
    steps.ran.clear()
    assert tuned(steps, table=before)
    assert steps.ran == set(candidates(OTHER))
    after = read_table(path_of(90))
    assert after.entries[:1] == before.entries and [entry.product for entry in after.entries] == [PRODUCT, OTHER]


def test_no_product_is_begun_when_the_time_is_over():
    steps = Steps([PRODUCT, OTHER], seconds_of() | seconds_of(OTHER))
    now = iter([0.0, 5.0, 10.0])
    assert not tuned(steps, seconds=10.0, clock=lambda: next(now))
    assert [entry.product for entry in read_table(path_of(90)).entries] == [PRODUCT]


def test_only_the_same_machine_and_software_go_on(monkeypatch):
    machine = SimpleNamespace(cpu="Some GPU", commit="0123456789ab")
    monkeypatch.setattr(tune, "describe_machine", lambda device: machine)
    new = tune.table_of_this_machine(path_of(90))
    assert (new.device, new.torch, new.commit, new.entries) == ("Some GPU", torch.__version__, machine.commit, [])
    write_table(path_of(90), dataclasses.replace(new, entries=[entry_of(ODD)]))
    assert tune.table_of_this_machine(path_of(90)).entries == [entry_of(ODD)]
    machine.commit = "ba9876543210"
    assert tune.table_of_this_machine(path_of(90)) == dataclasses.replace(new, commit=machine.commit)


def test_without_a_device_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["tools.gpu.tune"])
    assert tune.main() == 1
    assert "make tune needs a CUDA device, and torch" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# What is tried
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [("half", 2), ("tf32", 4), ("ieee", 4)], ids=lambda how: how[0])
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_candidates(how, architecture):
    precision, widest = how
    for rows, columns in ((32, 32), (128, 64), (1024, 1024)):
        product = tile_table.product_class(rows, columns, widest, precision, architecture)
        tried = candidates(product)
        assert tried[0] == counted_tiles(rows, columns, widest, precision, architecture)
        assert len(tried) == len(set(tried)) <= 20
        for tiles in tried:
            staged = tiles.num_stages * tiles.depth * (tiles.rows + tiles.columns) * widest
            assert staged <= SHARED_MEMORY[architecture] and tiles.rows % tiles.parts == 0
    assert len(tried) > 10  # of the largest


REPORT = Report(
    128, stack=0, shared=1024, threads=128, wide_loads=1, wide_stores=1, tile_loads=1, tensor_cores="wgmma.mma_async"
)


@pytest.mark.parametrize(
    ("report", "reason"),
    [
        (REPORT, None),
        (REPORT._replace(stack=16), "spills, 16 bytes of stack"),
        (REPORT._replace(shared=2**20), "1048576 bytes of shared memory"),
        (REPORT._replace(tensor_cores="mma.sync"), "multiplies by mma.sync, not by wgmma.mma_async"),
        (RuntimeError("too few\nregisters"), "RuntimeError: too few"),
    ],
    ids=["passes", "spills", "shared_memory", "no_wgmma", "not_compiled"],
)
def test_the_gate_judges_every_kernel_with_the_tiles(report, reason, monkeypatch):
    seen = []

    def compile_variant(variant):
        seen.append(variant)
        assert_has(variant.launch(), ODD)
        if isinstance(report, Exception) and variant.kernel == "weight_gradient":
            raise report
        return (report if variant.kernel == "weight_gradient" else REPORT), ""

    monkeypatch.setattr(tile_trials, "compile_variant", compile_variant)
    found = why_refused(PRODUCT, ODD)
    assert found == (reason and f"weight_gradient bfloat16 128x64x128 sm_90: {reason}")
    assert seen == variants_of(PRODUCT)


def assert_has(launch, tiles):
    """A launch of a kernel with these tiles."""
    _, _, options = launch
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "PARTS", "num_warps", "num_stages", "maxnreg")  # in the order of fields
    assert tuple(options[name] for name in names) == dataclasses.astuple(tiles)[:-1]  # descriptors are arguments


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------


def entry_of(tiles, product=PRODUCT):
    return Entry(product, tiles, "some steps", median_ms=1.0, default_ms=1.5, error=1e-3)


def write_entries(*entries):
    write_table(path_of(90), dataclasses.replace(MACHINE, entries=list(entries)))


def test_measured_tiles_are_those_of_their_class_alone():
    write_entries(entry_of(ODD))
    inside = [(65, 33, 2, "half", 90, True), (128, 64, 2, "half", 90, True)]
    outside = [
        (64, 64, 2, "half", 90, True),
        (129, 64, 2, "half", 90, True),
        (128, 32, 2, "half", 90, True),
        (128, 65, 2, "half", 90, True),
        (128, 64, 4, "half", 90, True),
        (128, 64, 4, "tf32", 90, True),
        (128, 64, 2, "half", 100, True),
        (128, 64, 2, "half", 90, False),
    ]
    assert {linear_tiles(*how) for how in inside} == {ODD}
    assert [linear_tiles(*how) for how in outside] == [counted_tiles(*how) for how in outside]


def test_entries_for_other_architectures_are_not_used():
    """In a file of theirs, and in one that has another's name."""
    product, deeper = dataclasses.replace(PRODUCT, architecture=80), dataclasses.replace(ODD, depth=64)
    write_entries(entry_of(deeper, product))
    write_table(path_of(80), dataclasses.replace(MACHINE, entries=[entry_of(deeper), entry_of(ODD, product)]))
    assert linear_tiles(128, 64, 2, "half", 90) == counted_tiles(128, 64, 2, "half", 90)
    assert linear_tiles(128, 64, 2, "half", 80) == ODD


def test_a_process_keeps_the_table_that_it_has_read():
    before = linear_tiles(128, 64, 2, "half", 90)
    write_entries(entry_of(ODD))
    assert linear_tiles(128, 64, 2, "half", 90) == before != ODD
    tile_table.measured_tiles.cache_clear()
    assert linear_tiles(128, 64, 2, "half", 90) == ODD


def test_the_key_has_every_argument_and_no_number_of_layers():
    names = [field.name for field in dataclasses.fields(ProductClass)]
    assert names == [*inspect.signature(linear_tiles).parameters]
    write_entries(entry_of(ODD))
    for n_layers in (1, 2, 40):
        z, target = torch.empty(n_layers, 100, 48, device="meta", dtype=torch.bfloat16).expand(2, -1, -1, -1)
        weight, one = z.new_empty(n_layers, 48, 48), [1.0] * n_layers
        with recorded(90, linear_launches, layers) as launches:
            given = ([z], [weight], [None], [target], [None], [0] * n_layers, True, 0)
            decoupled_linear.decoupled_linear(*given, 1.0, one, one, one, one, [True], [True])
        assert_has(launches[0], ODD)


@pytest.mark.parametrize("size", [0, 1, 32, 33, 1023, 1024, 10**6])
def test_tiles_that_are_counted_are_the_same_for_a_class(size):
    """So that what is timed as the default of a class is that of all its products."""
    of_class = tile_table.product_class(size, size, 2, "half", 90)
    assert tile_table.product_class(**dataclasses.asdict(of_class)) == of_class
    assert counted_tiles(size, size, 2, "half", 90) == counted_tiles(**dataclasses.asdict(of_class))


def change(path, value):
    """A table as JSON, with another value at this path; None: without it."""
    values = dataclasses.asdict(dataclasses.replace(MACHINE, entries=[entry_of(ODD)]))
    *parents, last = path
    of = values
    for key in parents:
        of = of[key]
    if value is None:
        del of[last]
    else:
        of[last] = value
    return json.dumps(values)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected JSON: Expecting property name"),
        ("[]", "table: expected the fields ['device', 'torch', 'triton', 'commit', 'entries'], got []"),
        (change(["commit"], None), "got ['device', 'torch', 'triton', 'entries']"),
        (change(["version"], 2), "got ['device', 'torch', 'triton', 'commit', 'entries', 'version']"),
        (change(["entries"], {}), "table.entries: expected a list, got {}"),
        (change(["entries", 0, "tiles", "depth"], "64"), "entries[0].tiles.depth: expected a positive int, got '64'"),
        (change(["entries", 0, "tiles", "rows"], 0), "table.entries[0].tiles.rows: expected a positive int, got 0"),
        (change(["entries", 0, "tiles", "parts"], True), "tiles.parts: expected a positive int, got True"),
        (change(["entries", 0, "product", "even"], 1), "table.entries[0].product.even: expected bool, got 1"),
        (change(["entries", 0, "median_ms"], "fast"), "table.entries[0].median_ms: expected float, got 'fast'"),
        (change(["entries", 0, "product", "precision"], "fp8"), "product.precision: expected one of ('half', "),
        (change(["entries", 0, "product", "rows"], 100), "product: expected a class as ProductClass(rows=128"),
    ],
    ids=["json", "object", "missing", "unknown", "list", "string", "zero", "bool", "int", "float", "word", "class"],
)
def test_a_file_that_is_no_table_is_named_with_its_field(text, message):
    path_of(90).parent.mkdir()
    path_of(90).write_text(text)
    with pytest.raises(ValueError) as raised:
        linear_tiles(128, 64, 2, "half", 90)
    assert str(raised.value).startswith(f"{path_of(90)}: ") and message in str(raised.value)


# ---------------------------------------------------------------------------------------------------------------------
# The gate
# ---------------------------------------------------------------------------------------------------------------------

OF_EVERY_KIND = [
    PRODUCT,
    dataclasses.replace(PRODUCT, rows=1024, columns=1024),
    dataclasses.replace(PRODUCT, widest=4),
    dataclasses.replace(PRODUCT, even=False),
    dataclasses.replace(PRODUCT, widest=4, precision="tf32", even=False),
    dataclasses.replace(PRODUCT, rows=64, widest=4, precision="ieee"),
    dataclasses.replace(PRODUCT, rows=512, columns=512, widest=4, precision="ieee"),
    dataclasses.replace(PRODUCT, widest=8, precision="float64"),
]


def test_the_gate_compiles_what_a_table_has():
    """Every kernel of every entry, with its tiles; and all that it compiles without a table."""
    counted = layer_variants()
    tile_table.measured_tiles.cache_clear()
    write_entries(*(entry_of(ODD, product) for product in OF_EVERY_KIND))
    added = [variant for variant in layer_variants() if variant not in counted]
    assert added == [variant for product in OF_EVERY_KIND for variant in variants_of(product)]
    assert set(counted) < set(layer_variants())
    for product in OF_EVERY_KIND:
        variants = variants_of(product)
        assert {"forward", "input_gradient", "weight_gradient"} < {variant.kernel for variant in variants}
        for variant in variants:
            assert_has(variant.launch(), ODD)
            assert variant.even == product.even
