"""The command line, as its user meets it."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from idx_files import write_mnist

import pyperc
from pyperc.__main__ import main
from pyperc.datasets import digits
from pyperc.train import error_rate

SHORT = ["train", "--epochs", "2", "--sizes", "64", "16", "10", "--no-progress"]


def test_info_prints_every_fact(capsys):
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    for part in (pyperc.__version__, torch.__version__, pyperc._C.isa(), "built against", "threads", "CUDA"):
        assert part in printed


def test_info_for_a_program(capsys):
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["torch"] == torch.__version__
    assert facts["isa"] in facts["isas"]
    assert (facts["cuda"] is None) == bool(facts["cuda_reason"])


def test_info_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "pyperc", "info"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("pyperc")
    assert done.stderr == ""


def test_info_says_why_an_isa_cannot_be_used():
    environment = {**os.environ, "PYPERC_ISA": "abacus"}
    done = subprocess.run([sys.executable, "-m", "pyperc", "info"], env=environment, capture_output=True, text=True)
    assert "abacus" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_train_refuses_an_isa_that_cannot_be_used():
    environment = {**os.environ, "PYPERC_ISA": "abacus"}
    done = subprocess.run([sys.executable, "-m", "pyperc", *SHORT], env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "abacus" in done.stderr
    assert "Traceback" not in done.stderr


def test_train_prints_a_row_for_each_epoch(capsys):
    assert main(SHORT) == 0
    printed = capsys.readouterr()
    assert re.search(r"network 64-16-10, relu, 1,210 parameters", printed.out)
    rows = re.findall(r"^ +(\d+) +\d\.\d{6} +[\d.]+% +[\d.]+% +[\d,]+$", printed.out, re.MULTILINE)
    assert rows == ["1", "2"]
    assert re.search(r"test accuracy of pyperc: [\d.]+%", printed.out)
    assert printed.err == ""


def test_train_compares_with_plain_torch(capsys):
    assert main([*SHORT, "--compare", "torch"]) == 0
    printed = capsys.readouterr().out
    assert "same curve as plain torch" in printed
    assert re.search(r"plain torch with the (plain|foreach|fused) form of its optimizer", printed)
    for name in ("forward", "backward", "a step of training", "an epoch of training"):
        assert re.search(rf"^{name} .* [um]s +[\d.]+ [um]s +[\d.]+  \([\d.]+ to [\d.]+\)$", printed, re.MULTILINE)
    assert re.search(r"^backward / forward +[\d.]+ +[\d.]+$", printed, re.MULTILINE)


def test_train_for_a_program_prints_json_alone(capsys):
    assert (
        main([*SHORT, "--json", "--compare", "torch", "--dtype", "float64", "--activation", "tanh", "--seed", "3"]) == 0
    )
    printed = capsys.readouterr()
    figures = json.loads(printed.out)
    assert (figures["sizes"], figures["dtype"], figures["activation"], figures["seed"]) == (
        [64, 16, 10],
        "float64",
        "tanh",
        3,
    )
    assert [point["epoch"] for point in figures["curve"]["pyperc"]] == [1, 2]
    assert figures["curve"]["torch"][1]["loss"] == pytest.approx(figures["curve"]["pyperc"][1]["loss"], rel=1e-10)
    assert figures["agreement"]["same"] is True
    assert figures["seconds"]["forward"]["ratio"]["median"] > 0
    assert figures["test_accuracy"].keys() == figures["backward_over_forward"].keys() == {"pyperc", "torch"}
    assert "epoch" in printed.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--optimizer", "adam"], "cross_entropy, adam, lr 0.001"),
        (["--optimizer", "sgd", "--momentum", "0.9", "--lr", "0.05"], "cross_entropy, sgd, lr 0.05, momentum 0.9"),
        (["--loss", "mse", "--optimizer", "adamw", "--lr", "0.01"], "mse, adamw, lr 0.01"),
        (["--loss", "hinge"], "hinge, sgd, lr 0.3"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_train_by_other_losses_and_optimizers(capsys, arguments, said):
    assert main([*SHORT, *arguments, "--compare", "torch"]) == 0
    printed = capsys.readouterr().out
    assert f"batches of 64, {said}, seed 0" in printed
    assert "same curve as plain torch" in printed


def test_train_saves_weights_that_load_safely(tmp_path, capsys):
    path = tmp_path / "digits.pt"
    assert main([*SHORT, "--save", str(path)]) == 0
    printed = capsys.readouterr().out
    assert str(path) in printed
    saved = torch.load(path, weights_only=True)
    model = pyperc.MLP(saved["sizes"], activation=saved["activation"])
    model.load_state_dict(saved["state_dict"])
    data = digits()
    told = 1 - float(re.search(r"test accuracy of pyperc: ([\d.]+)%", printed)[1]) / 100
    assert error_rate(model, (data.x_test - saved["mean"]) / saved["std"], data.y_test) == pytest.approx(told, abs=1e-4)
    assert saved["sizes"] == [64, 16, 10]


def test_train_draws_its_curves(tmp_path, capsys):
    path = tmp_path / "curve.png"
    assert main([*SHORT, "--plot", str(path)]) == 0
    assert str(path) in capsys.readouterr().out
    assert path.read_bytes().startswith(b"\x89PNG")


def test_train_reads_mnist_and_takes_its_sizes(tmp_path, capsys):
    write_mnist(tmp_path)
    assert main(["train", "--data", f"mnist:{tmp_path}", "--epochs", "1", "--threads", "1"]) == 0
    printed = capsys.readouterr().out
    assert "network 12-256-256-10" in printed
    assert "200 samples to train, 50 to test" in printed
    assert "1 thread, float32" in printed
    assert "1 epoch in batches" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["train", "--epochs", "0"], "argument --epochs: must be a whole number of at least 1, got '0'"),
        (["train", "--epochs", "1.5"], "argument --epochs: must be a whole number of at least 1, got '1.5'"),
        (["train", "--batch-size", "-1"], "argument --batch-size: must be a whole number of at least 1, got '-1'"),
        (["train", "--threads", "0"], "argument --threads: must be a whole number of at least 1, got '0'"),
        (["train", "--lr", "-0.1"], "argument --lr: must be a finite positive number, got '-0.1'"),
        (["train", "--lr", "nan"], "argument --lr: must be a finite positive number, got 'nan'"),
        (["train", "--lr", "fast"], "argument --lr: must be a finite positive number, got 'fast'"),
        (["train", "--loss", "absolute"], "argument --loss: invalid choice: 'absolute'"),
        (["train", "--optimizer", "lbfgs"], "argument --optimizer: invalid choice: 'lbfgs'"),
        (["train", "--optimizer", "adam", "--momentum", "0.9"], "argument --momentum: is sgd's, adam has none"),
        (["train", "--seed", "-1"], "argument --seed: must be a whole number in [0, 2**63), got '-1'"),
        (["train", "--activation", "step"], "argument --activation: invalid choice: 'step'"),
        (["train", "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["train", "--compare", "jax"], "argument --compare: invalid choice: 'jax'"),
        (["train", "--data", "cifar"], "the data must be digits or mnist:DIR, got 'cifar'"),
        (["train", "--data", "mnist:nowhere"], "looked in nowhere for train-images-idx3-ubyte"),
        (
            ["train", "--sizes", "63", "10"],
            "must begin with the data's 64 features and end with its 10 classes, got 63 10",
        ),
        (
            ["train", "--sizes", "64", "9"],
            "must begin with the data's 64 features and end with its 10 classes, got 64 9",
        ),
        (["train", "--sizes", "64"], "must begin with the data's 64 features and end with its 10 classes, got 64"),
        (["train", "--sizes", "64", "0", "10"], "argument --sizes: must be a whole number of at least 1, got '0'"),
        (["train", "--save", "no/such/folder.pt"], "must be a file in an existing folder, got 'no/such/folder.pt'"),
        (["train", "--plot", "."], "argument --plot: must be a file in an existing folder, got '.'"),
        (["train", "--plot", "curve.txt"], "argument --plot: the file must end in one of"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments_are_named(refusal, arguments, message):
    assert message in refusal(*arguments)


def without(package: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command where the package is not installed."""
    code = f"import sys; sys.modules[{package!r}] = None; from pyperc.__main__ import main; sys.exit(main())"
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("package", "arguments", "said"),
    [
        ("sklearn", ["experiment", "svm"], "pyperc.linear_model needs scikit-learn: pip install scikit-learn, or the "),
        ("sklearn", ["experiment", "all"], "pyperc.linear_model needs scikit-learn: pip install scikit-learn, or the "),
        ("sklearn", ["experiment", "mlp"], "digits needs scikit-learn: pip install scikit-learn, or the extra "),
        ("sklearn", SHORT, "digits needs scikit-learn: pip install scikit-learn, or the extra "),
        ("matplotlib", ["experiment", "descent", "--plot", "."], "argument --plot: needs matplotlib: pip install "),
        ("matplotlib", [*SHORT, "--plot", "a.png"], "argument --plot: needs matplotlib: pip install matplotlib, or "),
        ("matplotlib", ["bench", "--plot", "."], "argument --plot: needs matplotlib: pip install matplotlib, or the "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_missing_extra_is_one_line(package, arguments, said):
    done = without(package, *arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"python -m pyperc: {said}")
    assert done.stderr.count("\n") == 1


def test_the_experiments_are_listed_without_scikit_learn():
    done = without("sklearn", "experiment", "--list")
    assert (done.returncode, done.stderr) == (0, "")
    assert "The support vector machine" in done.stdout


def test_a_diverging_training_fails_with_a_hint(capsys):
    assert main([*SHORT, "--lr", "1e30"]) == 1
    assert "a smaller lr may help" in capsys.readouterr().err


def test_ctrl_c_leaves_cleanly():
    command = [sys.executable, "-m", "pyperc", "train", "--epochs", "1000000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if re.match(r" +1 ", line):
                process.send_signal(signal.SIGINT)
                break
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.strip() == "interrupted"
