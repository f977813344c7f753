"""The benchmark: its measuring, its figures of cost, the command line with the smallest of budgets, and the report."""

import contextlib
import importlib.util
import io
import itertools
import json
import math
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from pyperc import _C
from pyperc.__main__ import main
from pyperc.bench import against, cases, command, machine, measure, tune
from pyperc.bench.cases import Network, Settings
from pyperc.bench.measure import Pace, calls, interleaved
from pyperc.bench.tables import backward, blas, gemm, grid, jacobian

ROOT = Path(__file__).resolve().parent.parent
BRIEF = Pace(0.01, warm_up=0.005, block=0.002, probe=0.0005, fewest=3)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """What one run of the command line printed, and what it wrote."""
    folder = tmp_path_factory.mktemp("bench")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        status = main(["bench", "--smoke", "--json", str(folder / "bench.json"), "--plot", str(folder / "figures")])
    torch.set_num_threads(threads)
    assert status == 0
    return printed.getvalue(), json.loads((folder / "bench.json").read_text()), folder


@pytest.fixture(scope="module")
def report():
    spec = importlib.util.spec_from_file_location("report", ROOT / "bench" / "report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_slower_contender_has_the_larger_ratio():
    contenders = {"pyperc": calls(lambda: time.sleep(0.001)), "eager": calls(lambda: time.sleep(0.004))}
    measured = interleaved(contenders, BRIEF)
    assert measured.ratios("eager", "pyperc").median > 2
    assert measured.samples["eager"].median > measured.samples["pyperc"].median >= 0.001
    assert measured.samples["pyperc"].share(1e6) > 0
    assert len(measured.samples["eager"].parts) >= 3


def test_a_slow_first_call_leaves_no_short_blocks():
    repeated = []

    def block(repeats):
        repeated.append(repeats)
        return (0.3 if len(repeated) == 1 else 1e-5 * repeats,)

    interleaved({"pyperc": block}, Pace(0.01, warm_up=0.0, block=0.002, probe=0.0005, fewest=3))
    assert repeated[:2] == [1, 1]
    assert set(repeated[2:]) == {200}


def test_blocks_beside_a_low_probe_are_dropped(monkeypatch):
    probes = iter([100.0] * 6 + [10.0] + [100.0] * 10000)
    monkeypatch.setattr(_C, "probe", lambda seconds: next(probes))
    monkeypatch.setattr(measure, "_best", {})
    measured = interleaved({name: calls(lambda: None) for name in ("a", "b")}, replace(BRIEF, patience=math.inf))
    assert sum(samples.dropped for samples in measured.samples.values()) == 2
    assert not measured.disturbed
    assert measured.probe == 100


def test_a_measurement_that_is_disturbed_throughout_says_so(monkeypatch):
    monkeypatch.setattr(_C, "probe", lambda seconds: 10.0)
    monkeypatch.setattr(measure, "_best", {(_C.isa(), torch.get_num_threads()): 100.0})
    measured = interleaved({name: calls(lambda: None) for name in ("a", "b")}, BRIEF)
    assert measured.disturbed
    assert measured.ratios("a", "b").median > 0
    assert measured.samples["a"].dropped == 0


@pytest.mark.parametrize("trips", [[60.0], [400.0], [60.0, 70.0, 400.0]], ids=["near", "far", "both"])
def test_cases_measured_on_cores_far_apart_are_marked(trips):
    (line,) = machine.distance(trips)
    assert ("marked far" in line) == (400.0 in trips)
    assert line.count("beside") == len({trip > cases.FAR for trip in trips})
    assert cases.label({"case": "a", "disturbed": False, "round_trip": trips[-1]}) == "a" + " (far)" * (400.0 in trips)


def test_the_round_trip_is_between_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert _C.round_trip() == 0
    torch.set_num_threads(2)
    assert max(_C.round_trip() for _ in range(50)) < 1e6
    torch.set_num_threads(threads)


def test_the_parts_of_a_call_are_told_apart():
    def block(repeats):
        return 3.0 * repeats, 6.0 * repeats

    measured = interleaved({"pyperc": block}, BRIEF)
    assert measured.samples["pyperc"].part(1) == 6
    assert measured.samples["pyperc"].median == 9
    assert measured.parts_ratio("pyperc", over=1, under=0).median == 2


@pytest.mark.parametrize("dx", [True, False], ids=["with dx of the input", "without dx of the input"])
@pytest.mark.parametrize("sizes", [(7, 5), (7, 5, 3), (4,) * 9], ids=str)
def test_counted_operations_are_those_of_the_formula(sizes, dx):
    network = Network(6, sizes)
    x, dy = network.data()
    first = 2 * 6 * sizes[0] * sizes[1]
    assert network.backward_flops(dx) == 2 * network.forward_flops - (0 if dx else first)
    assert network.forward_flops == sum(2 * 6 * k * n for k, n in itertools.pairwise(sizes))
    for model in network.models().values():
        assert backward.counted(model, x, dy, dx) == {
            "forward": network.forward_flops,
            "backward": network.backward_flops(dx),
        }


def test_contenders_compute_the_same():
    network = Network(5, (4, 6, 3), "tanh")
    x, dy = network.data()
    ours, plain = network.models().values()
    assert type(plain) is nn.Sequential
    torch.testing.assert_close(ours(x), plain(x))
    gradients = [torch.autograd.grad(model(x), list(model.parameters()), dy) for model in (ours, plain)]
    torch.testing.assert_close(*gradients)


def test_threads_and_isa_are_put_back():
    before = torch.get_num_threads(), _C.isa()
    (record,) = gemm.product("gemm", 8, 8, 8, "dx", threads=2, isa="scalar").run(BRIEF)
    assert (record["threads"], record["isa"]) == (2, "scalar")
    assert (torch.get_num_threads(), _C.isa()) == before


def test_the_grid_holds_every_activation_and_lists_the_slower_points(monkeypatch):
    points = grid.points()
    assert {network.activation for network, _ in points} >= {"relu", "gelu", "sign"}
    assert {network.batch for network, _ in points} == set(grid.BATCHES)
    assert {network.sizes[0] for network, _ in points} == set(grid.WIDTHS)
    slow = {"pyperc": calls(lambda: time.sleep(0.002)), "eager": calls(lambda: None)}
    monkeypatch.setattr(Network, "contenders", lambda self, work: slow)
    record = grid.sweep("one", [(Network(3, (4, 4), "relu", "relu"), "forward")], 10, BRIEF, BRIEF)
    (table,) = grid.tables([record])
    assert table.rows[0][0] == "3 x 4->4 relu"
    assert table.rows[0][-1] == "at length"
    assert "1 slower than eager" in table.notes[0]


def test_the_command_prints_every_table_the_machine_and_the_noise(smoke):
    printed = smoke[0]
    for title in (
        "Products of squares: share of the FMA peak",
        "Linear and activation, no grad",
        "Forward and backward (dx, dw, db)",
        "Inference, no grad",
        "Jacobian with respect to the input",
        "Elementary functions",
        "on 1 thread: share of that peak",
        "Backward over forward",
        "Small networks: where the time goes",
        "Any shape",
        "How the cost grows",
        "Memory: peak",
        "FMA peak",
        "noise: ",
        "blocks dropped",
        f"torch {torch.__version__}",
    ):
        assert title in printed


def test_the_saved_run_holds_every_case(smoke):
    _, saved, _ = smoke
    assert saved["schema"] == 1
    assert saved["mode"] == "smoke"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT.*", saved["date"])
    assert {"processor", "cores", "isa", "threads", "torch", "probe", "memory_bandwidth"} <= saved["machine"].keys()
    assert {"blocks", "dropped", "spread", "disturbed", "round_trips"} == saved["noise"].keys()
    tables = {record["table"] for record in saved["records"]}
    assert tables == {table.NAME for table in command.TABLES} - {"numpy"}
    for record in saved["records"]:
        assert {"table", "case", "work"} <= record.keys()
        for contender in record.get("contenders", {}).values():
            assert contender["seconds"] > 0
            assert contender["blocks"] >= 1
        for ratio in record.get("ratios", {}).values():
            assert ratio["lower"] <= ratio["median"] <= ratio["upper"]


def test_memory_counts_what_a_pass_cannot_do_without(smoke):
    record = next(record for record in smoke[1]["records"] if record["table"] == "memory")
    batch, (k, n) = record["batch"], record["sizes"]
    least = 4 * (batch * n + n * k + n + batch * k)  # y, dw, db and dx
    for peak in record["peak"].values():
        assert peak["allocated"] >= least
        assert 0 <= peak["kept"] < peak["allocated"]


def test_the_figures_are_drawn(smoke):
    printed, _, folder = smoke
    for name in ("roofline", "ratio", "growth", "backward"):
        assert (folder / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"{name}.png" in printed


def test_the_report_rewrites_what_stands_between_the_markers(smoke, report, tmp_path):
    _, saved, folder = smoke
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- bench:begin -->\nold\n<!-- bench:end -->\nafter\n")
    for _ in range(2):
        report.main([str(folder / "bench.json"), "--readme", str(readme)])
        page = readme.read_text()
        assert page.startswith("before\n<!-- bench:begin -->\n")
        assert page.endswith("\n<!-- bench:end -->\nafter\n")
        assert "old" not in page
        assert page.count("**Forward and backward (dx, dw, db), batch x sizes**") == 1
        assert saved["date"][:10] in page
        assert saved["machine"]["processor"] in page
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in rows)


def test_the_report_refuses_what_it_cannot_use(smoke, report, tmp_path):
    _, _, folder = smoke
    readme = tmp_path / "README.md"
    readme.write_text("no markers")
    with pytest.raises(SystemExit, match="must hold"):
        report.main([str(folder / "bench.json"), "--readme", str(readme)])
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(SystemExit, match="must be what"):
        report.main([str(tmp_path / "other.json"), "--readme", str(readme)])


def test_the_report_reads_what_pytest_benchmark_saved(smoke, report, tmp_path):
    saved = smoke[1]
    record = next(record for record in saved["records"] if record["table"] == "mlp")
    info = {"record": record, "machine": saved["machine"], "date": saved["date"]}
    path = tmp_path / "benchmark.json"
    path.write_text(json.dumps({"benchmarks": [{"extra_info": {**info, "contender": c}} for c in ("pyperc", "eager")]}))
    assert report.read(path)["records"] == [record]
    assert record["case"] in report.section(report.read(path))


def test_only_the_tables_that_were_asked_for(capsys):
    assert main(["bench", "--smoke", "--only", "elementwise"]) == 0
    printed = capsys.readouterr().out
    assert "Elementary functions" in printed
    assert "Products" not in printed


def test_tune_prints_its_table_beside_the_constants(capsys):
    assert main(["bench", "--smoke", "--tune"]) == 0
    printed = capsys.readouterr().out
    assert "Thresholds of the plan" in printed
    now = _C.thresholds()["parallel_flops"]
    assert re.search(rf"flops of each thread from which another one pays +parallel_flops +{now} ", printed)
    assert "rows of a chunk" in printed
    assert "peak_percent is chosen for memory" in " ".join(printed.split())


def test_a_run_in_pieces_measures_every_case_once(capsys, tmp_path):
    file = tmp_path / "bench.json"
    arguments = ["bench", "--smoke", "--only", "elementwise", "jacobian", "--json", str(file), "--resume"]
    for left in (3, 2):
        assert main([*arguments, "--seconds", "1e-9"]) == command.LEFT
        assert f"{left} of 4 cases are left" in capsys.readouterr().out
    assert main(arguments) == 0
    assert "Elementary functions" in capsys.readouterr().out
    saved = json.loads(file.read_text())
    assert [record["table"] for record in saved["records"]] == ["jacobian", *["elementwise"] * 3]
    assert len(set(saved["measured"])) == 4
    assert main(arguments) == 0
    assert json.loads(file.read_text())["records"] == saved["records"]


def test_a_run_of_another_machine_is_not_added_to(smoke, capsys, tmp_path):
    other = {**smoke[1], "machine": {**smoke[1]["machine"], "processor": "abacus"}}
    file = tmp_path / "bench.json"
    file.write_text(json.dumps(other))
    with pytest.raises(SystemExit):
        main(["bench", "--smoke", "--json", str(file), "--resume"])
    assert "must be of the same processor, abacus" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["smoke", "quick", "full"])
def test_every_case_has_a_name_of_its_own(mode):
    for table in command.TABLES:
        names = [job.name for job in table.jobs(Settings(mode, growth=True))]
        assert len(names) == len(set(names))


def test_two_runs_are_compared_in_units_of_the_peak(smoke):
    now = smoke[1]
    records = [dict(r) for r in now["records"] if r["table"] == "mlp"]
    for record in records:
        contenders = {name: {**c, "seconds": 3 * c["seconds"]} for name, c in record["contenders"].items()}
        record.update(contenders=contenders, probe=record["probe"] / 1.5)
    table = against.table(now, {**now, "records": records})
    assert [row[1:3] for row in table.rows] == [["2.00", "2.00"]] * len(records)
    assert table.rows[0][0] == "mlp: 3 x 4->5->2 relu, forward+backward"
    assert against.table(now, {**now, "records": []}).notes


def test_the_jacobian_is_that_of_vmap_and_jacrev(monkeypatch):
    monkeypatch.setattr(jacobian, "calls", lambda run, within: run())
    found = jacobian.contenders(Network(5, (4, 6, 3), "tanh"))
    torch.testing.assert_close(found["pyperc"], found["eager"])


def test_numpy_is_measured_in_a_process_of_its_own():
    records = blas.measure([(16, 16, 16, layout) for layout in gemm.LAYOUTS] + [(4, 6, 5, "dw")], 0.002)
    assert [record["work"] for record in records] == [*gemm.LAYOUTS, "dw"]
    assert records[-1]["flops"] == 2 * 4 * 6 * 5
    assert blas.tables(records[:3])[0].rows[0][0] == "16"


def test_tune_forces_each_way_and_puts_the_thresholds_back(monkeypatch):
    before, forced = _C.thresholds(), {name: set() for name in _C.thresholds()}
    set_thresholds = _C.set_thresholds

    def recorded(values):
        for name, value in values.items():
            forced[name].add(value)
        set_thresholds(values)

    monkeypatch.setattr(_C, "set_thresholds", recorded)
    result = tune.measure(Pace(0.001, warm_up=0.001, block=0.0005, probe=0.0005, fewest=1, patience=1))
    assert _C.thresholds() == before
    assert all(len(values) > 1 for values in forced.values())
    measured = {each["name"] for each in result["thresholds"]}
    measured |= {name for each in result["blocks"] for name in each["names"]}
    assert measured == set(before)


def test_the_two_ways_of_a_ladder_are_two_on_every_step():
    """Where the plan says so: not how a backward pass reads its operands, nor how many weights are packed at once."""
    torch.set_num_threads(2)
    before = _C.thresholds()
    steps = [(each, step) for each in tune.thresholds() for step in each.ladder]
    for each, step in steps:
        if {"in place", "in pieces"} & set(each.ways):
            continue
        network = each.shape(step)
        x, weights = torch.empty(network.batch, network.sizes[0]), [torch.empty(n, k) for k, n in network.pairs]
        names = [network.activation] * (len(weights) - 1) + [network.output]
        plans = []
        for values in each.ways.values():
            _C.set_thresholds(values)
            plan = _C.plan(x, weights, [None] * len(weights), _C.Chain([(name, []) for name in names]))
            _C.set_thresholds(before)
            backward = plan.pop("backward")
            plans.append(plan if each.work == "forward" else backward)
        assert plans[0] != plans[1], f"{each.name} at {step}"


def test_the_crossing_is_where_the_second_way_stays_ahead():
    steps = [{"at": at, "ratio": ratio} for at, ratio in ((1, 1.2), (2, 0.9), (4, 1.1), (8, 1.5))]
    assert tune.crossing(steps) == 4
    assert tune.crossing(steps[:2]) is None
    assert tune.crossing(steps[2:]) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quick", "--full"], "not allowed with argument"),
        (["--json", "no/such/file.json"], "argument --json: must be a file in an existing folder"),
        (["--only", "cooking"], "invalid choice: 'cooking'"),
        (["--plot", __file__], "argument --plot: must be a folder"),
        (["--resume"], "argument --resume: needs the file"),
        (["--seconds", "0"], "argument --seconds: must be above 0"),
        (["--against", "no/such/file.json"], "no/such/file.json cannot be read"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments_are_named(refusal, arguments, message):
    assert message in refusal("bench", *arguments)


def test_quartiles_of_a_spread():
    assert measure.quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)
    assert not math.isnan(measure.Samples([(1.0,)], [1.0], [True]).spread)


@pytest.mark.skipif(not _C.build()["cuda"], reason="built without CUDA")
def test_the_times_on_a_gpu_run_to_their_end_without_one(tmp_path):
    report = tmp_path / "gpu.json"
    command = [sys.executable, ROOT / "bench" / "gpu.py", "--device", "cpu", "--quick", "--json", report]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    written = json.loads(report.read_text())
    assert len(written["figures"]) == done.stdout.split("hoped\n")[1].count("\n")  # a figure for every bar
    assert not any("error" in row for row in written["rows"])
