"""The lectures' experiments in their quick form: each claim by its numbers, the figures, the page, the command line."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import re
from html import escape
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from idx_files import write_mnist

from pyperc import _plot
from pyperc.__main__ import main
from pyperc.experiments import NAMES, Claim, Experiment, Result, Setup, Table, find, universal


class Everything(NamedTuple):
    """What one run of all experiments left."""

    folder: Path
    printed: str
    status: int
    numbers: dict[str, Any]
    figures: dict[str, Any]


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Everything:
    folder = tmp_path_factory.mktemp("experiments")
    drawn: dict[str, Any] = {}
    save = _plot.save

    def record(figure: Any, path: Path) -> None:
        save(figure, path)
        drawn[path.stem] = figure

    arguments = ["experiment", "all", "--quick", "--plot", str(folder / "new"), "--json", str(folder / "numbers.json")]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.setattr(_plot, "save", record)
        status = main(arguments)
    torch.set_num_threads(threads)
    numbers = json.loads((folder / "numbers.json").read_text())
    return Everything(folder / "new", out.getvalue(), status, numbers, drawn)


@pytest.fixture
def numbers(everything: Everything, request: pytest.FixtureRequest) -> dict[str, Any]:
    """Those of the experiment that the test is named after."""
    name = request.node.name.removeprefix("test_").partition("_shows_")[0].replace("_", "-")
    found: dict[str, Any] = everything.numbers["experiments"][name]
    return found


def falls(values: list[float]) -> bool:
    return all(a > b for a, b in itertools.pairwise(values))


@pytest.mark.parametrize("name", NAMES)
def test_every_claim_holds(everything, name):
    claims = everything.numbers["experiments"][name]["claims"]
    assert len(claims) >= 2
    assert [claim["text"] for claim in claims if not claim["holds"]] == []


def test_the_status_says_that_all_claims_hold(everything):
    assert everything.status == 0


def test_perceptron_shows_an_epoch_without_changes(numbers):
    *_, last = numbers["history"]
    assert (last["changes"], last["train_error"]) == (0, 0)
    assert numbers["train"] + numbers["test"] == 360


def test_margin_shows_changes_under_the_bound(numbers):
    for row in numbers["rows"]:
        assert 0 < row["changes"] <= row["bound"]
        assert row["changes"] == row["scaled_changes"]
        assert row["bound"] == pytest.approx(4 * row["radius"] ** 2 / row["margin"] ** 2, abs=1)


def test_svm_shows_a_wider_margin_than_the_perceptron(numbers):
    *_, hardest = numbers["planes"]
    assert hardest["nearest"] > numbers["perceptron"]["nearest"] > 0
    assert hardest["support"] < 10
    assert numbers["moved_without_the_others"] < 1e-7


def test_lda_shows_the_posterior_of_the_populations(numbers):
    assert falls(numbers["posterior_difference"])
    assert numbers["error"][-1] == pytest.approx(numbers["bayes"], abs=0.003)


def test_logistic_shows_a_boundary_that_comes_to_that_of_lda(numbers):
    assert falls(numbers["loss"])
    assert falls(numbers["angle"])
    assert numbers["area_between"][-1] < 0.05
    assert numbers["gradient_difference"] < 1e-12


def test_xor_shows_what_a_product_and_what_units_add(numbers):
    assert {table for table, wrong in numbers["wrong"].items() if wrong["plain"]} == {"0110", "1001"}
    assert all(wrong["mapped"] == wrong["units"] == 0 for wrong in numbers["wrong"].values())


def test_features_shows_errors_that_fall_with_the_products(numbers):
    assert falls(numbers["train_error"])
    assert falls(numbers["test_error"])


def test_bias_variance_shows_that_they_add_up_to_the_error(numbers):
    terms = zip(numbers["bias2"], numbers["variance"], numbers["error"], strict=True)
    assert all(error == pytest.approx(bias + variance, rel=1e-9) for bias, variance, error in terms)
    assert falls(numbers["train_error"])
    assert falls(numbers["variance"][::-1])
    assert numbers["degrees"][numbers["error"].index(min(numbers["error"]))] == 5


def test_knn_radial_shows_fewer_errors_with_the_radial_feature(numbers):
    pairs = zip(numbers["error"]["coordinates"], numbers["error"]["radial"], strict=True)
    assert all(coordinates > radial >= numbers["least"] * 0.9 for coordinates, radial in pairs)


def test_universal_shows_errors_that_fall_with_k(numbers):
    assert falls(numbers["error"]["relu"][2:])
    assert falls(numbers["error"]["sigmoid"][2:])
    assert all(error <= bound for error, bound in zip(numbers["error"]["relu"], numbers["relu_bound"], strict=True))
    assert numbers["K"][-1] == 128
    assert numbers["error"]["relu"][-1] < 2e-3


def test_the_relu_network_passes_through_every_knot():
    knots = torch.linspace(0, 1, 12, dtype=torch.float64)
    got = universal.relu_network(knots)(knots[:, None])[:, 0]
    torch.testing.assert_close(got, universal.psi(knots), rtol=1e-12, atol=1e-12)


def test_descent_shows_several_minima_and_an_eta_that_is_too_large(numbers):
    assert len(numbers["minima"]) == 3
    *settled, restless = numbers["paths"]
    assert all(path["never_rose"] for path in settled)
    assert not restless["never_rose"]
    assert restless["gradient"] > 0.1


def test_mlp_shows_a_loss_that_falls(numbers):
    losses = {name: [epoch["loss"] for epoch in curve] for name, curve in numbers["curve"].items()}
    assert losses["relu"][-1] < losses["relu"][0] / 5
    assert losses["relu"][-1] < losses["identity"][-1]
    assert numbers["curve"]["relu"][-1]["test_error"] < 0.06
    assert numbers["collapsed_difference"] < 1e-12


def test_backprop_shows_derivatives_that_are_autograds_and_the_cost_rule(numbers):
    assert numbers["difference_from_autograd"] < 1e-14
    assert numbers["difference_from_pyperc"] < 1e-14
    assert set(numbers["derivatives"]) == {
        f"{kind}({layer})" for kind in ("dx", "ds", "dw", "db") for layer in (1, 2)
    } | {"dx(0)"}
    with_dx, without_dx = numbers["cost"]
    assert with_dx["counted"] == 2
    # Three layers of one width: the first one's dx is a third of the forward products.
    assert (
        3 * (2 * without_dx["forward_operations"] - without_dx["backward_operations"])
        == without_dx["forward_operations"]
    )
    assert 0 < with_dx["timed"]["pyperc"] < math.inf


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_is_a_png_whose_axes_are_named(everything, name):
    assert (everything.folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    axes = [axes for axes in everything.figures[name].axes if axes.axison and axes.get_label() != "<colorbar>"]
    assert axes
    for one in axes:
        assert any(other.get_xlabel() for other in one.get_shared_x_axes().get_siblings(one))
        assert any(other.get_ylabel() for other in one.get_shared_y_axes().get_siblings(one))


class Page(HTMLParser):
    """The images, links and places of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.images: list[dict[str, str | None]] = []
        self.links: list[str | None] = []
        self.places: set[str | None] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.places.add(given.get("id"))
        if tag == "img":
            self.images.append(given)
        if "href" in given:
            self.links.append(given["href"])


def test_the_page_shows_every_figure_and_needs_nothing_from_elsewhere(everything):
    text = (everything.folder / "index.html").read_text()
    page = Page(text)
    assert [image["src"] for image in page.images] == [f"{name}.png" for name in NAMES]
    assert all(image["alt"] for image in page.images)
    assert page.links == [f"#{name}" for name in NAMES]
    assert {link[1:] for link in page.links} <= page.places
    assert "http" not in text
    assert "<script" not in text
    for name in NAMES:
        assert escape(find(name).title) in text


def test_all_prints_every_experiment_and_where_the_page_is(everything):
    for name in NAMES:
        assert f"{name}, lecture {find(name).lecture}: " in everything.printed
    assert str(everything.folder / "index.html") in everything.printed


def test_the_list_names_every_experiment(capsys):
    assert main(["experiment", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split()[0] for line in lines] == list(NAMES)


def test_one_experiment_alone(tmp_path, capsys):
    path = tmp_path / "numbers.json"
    assert main(["experiment", "descent", "--quick", "--json", str(path)]) == 0
    assert "eta" in capsys.readouterr().out
    written = json.loads(path.read_text())
    assert list(written["experiments"]) == ["descent"]
    assert written["quick"] is True
    assert list(tmp_path.iterdir()) == [path]


def test_the_same_numbers_again(everything):
    again = json.loads(json.dumps(find("descent").run(Setup(quick=True)).numbers))
    before = everything.numbers["experiments"]["descent"]
    assert again == {name: before[name] for name in again}


def test_images_in_the_format_of_mnist(tmp_path, capsys):
    write_mnist(tmp_path)
    main(["experiment", "mlp", "--quick", "--data", f"mnist:{tmp_path}", "--plot", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "(MNIST)" in printed
    assert "12-128-10" in printed
    assert (tmp_path / "mlp.png").exists()


def test_a_claim_that_does_not_hold_is_told(monkeypatch, capsys):
    refuted = Result([Table(["n"], [["1"]])], {}, [Claim("the earth is flat", False)], "", lambda figure: None)
    monkeypatch.setattr(Experiment, "run", property(lambda experiment: lambda setup: refuted))
    assert main(["experiment", "descent"]) == 1
    assert "NO   the earth is flat" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: NAME, one of "),
        (["alchemy"], "argument NAME: invalid choice: 'alchemy'"),
        (
            ["descent", "--plot", "no/such/folder"],
            "argument --plot: must be a folder, or a new one in an existing folder",
        ),
        (["descent", "--json", "."], "argument --json: must be a file in an existing folder, got '.'"),
        (["descent", "--data", "mnist:."], "argument --data: descent makes points of its own and looks at no images"),
        (["mlp", "--data", "cifar"], "the data must be digits or mnist:DIR, got 'cifar'"),
        (["mlp", "--data", "mnist:nowhere"], "looked in nowhere for train-images-idx3-ubyte"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments_are_named(refusal, arguments, message):
    assert message in refusal("experiment", *arguments)


def test_the_page_of_the_lectures_names_every_experiment_and_nothing_that_is_not_there():
    text = (Path(__file__).parents[1] / "docs" / "lectures.md").read_text()
    assert [name for name in NAMES if f"`{name}`" not in text] == []
    named = re.findall(r"`(linear_model|features|functional)\.(\w+)", text)
    assert len(named) >= 10
    assert [(module, name) for module, name in named if not hasattr(import_module(f"pyperc.{module}"), name)] == []


def test_an_unknown_experiment_is_named():
    with pytest.raises(ValueError, match=r"must be one of .*backprop, got 'alchemy'"):
        find("alchemy")
