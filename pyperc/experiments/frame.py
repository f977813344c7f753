"""What every experiment shares: what it is given, and what it hands back."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from pyperc import _tables, datasets
from pyperc.datasets import Dataset


@dataclass(frozen=True)
class Setup:
    """What an experiment is given."""

    data_name: str = "digits"
    """`digits` or `mnist:DIR`, as `pyperc.datasets.load` reads it"""
    quick: bool = False
    """the same claims from less work, for the tests"""

    @cached_property
    def data(self) -> Dataset:
        """The images, loaded when an experiment first asks for them."""
        return datasets.load(self.data_name)

    @property
    def label(self) -> str:
        """The data's name as a figure shows it."""
        return "MNIST" if self.data_name.startswith("mnist") else self.data_name

    def one_against(self, one: int, other: int | None = None) -> Dataset:
        """The images of class `one` as y = +1 against those of `other`, or of all other classes, as y = -1."""

        def part(x: Any, y: Any) -> tuple[Any, Any]:
            kept = (y == one) | (y == other) if other is not None else y >= 0
            return x[kept], (y[kept] == one).long() * 2 - 1

        data = self.data
        return Dataset(*part(data.x_train, data.y_train), *part(data.x_test, data.y_test), classes=2)


class Table(NamedTuple):
    """Rows of cells under their columns, ready to print."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""

    def __str__(self) -> str:
        return (self.title and self.title + "\n") + _tables.align(self.columns, self.rows)


class Claim(NamedTuple):
    """What the lecture says, in this experiment's numbers, and whether they bear it out."""

    text: str
    holds: bool


@dataclass(frozen=True)
class Result:
    """What an experiment hands back."""

    tables: Sequence[Table]
    numbers: dict[str, Any]
    """plain Python, ready for json.dump"""
    claims: Sequence[Claim]
    caption: str
    """what the figure shows, in a sentence or two"""
    draw: Callable[[Any], None]
    """draws into a matplotlib Figure, empty and of `size`"""
    size: tuple[float, float] = (10.0, 4.0)
    """of the figure, in inches"""

    def text(self) -> str:
        """The tables, and below them the claims."""
        verdicts = "\n".join(f"{'yes' if claim.holds else 'NO '}  {claim.text}" for claim in self.claims)
        return "\n\n".join([*map(str, self.tables), verdicts])

    def save(self, path: Path) -> None:
        """Draws the figure into a file."""
        from pyperc import _plot

        figure = _plot.blank(self.size)
        self.draw(figure)
        _plot.save(figure, path)


@dataclass(frozen=True)
class Experiment:
    """One demonstration of a lecture."""

    name: str
    lecture: str
    title: str
    uses_data: bool = field(default=False, kw_only=True)
    """whether it looks at the images, or makes points of its own"""

    @property
    def run(self) -> Callable[[Setup], Result]:
        """Runs it: what its module, imported here, defines as `run`.

        Raises ImportError where scikit-learn, which the linear models stand on, is not installed.
        """
        run: Callable[[Setup], Result] = importlib.import_module(f"{__package__}.{self.name.replace('-', '_')}").run
        return run
