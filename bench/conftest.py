"""Benchmarks are the files named bench_*.py; `--compile` measures torch.compile of the same networks beside them."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyperc.bench.cases import Compiler, Settings


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--compile", action="store_true", help="measure torch.compile, too: seconds more for each network")


def pytest_collect_file(parent: pytest.Collector, file_path: Path) -> pytest.Module | None:
    if file_path.match("bench_*.py") and not parent.session.isinitpath(file_path):
        return pytest.Module.from_parent(parent, path=file_path)
    return None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "contender" in metafunc.fixturenames:
        compiled = metafunc.config.getoption("--compile") and "settings" in metafunc.fixturenames
        contenders = getattr(metafunc.module, "CONTENDERS", ["pyperc", "eager"])
        metafunc.parametrize("contender", [*contenders, *["compile"] * compiled])


@pytest.fixture(scope="session")
def settings(pytestconfig: pytest.Config) -> Settings:
    return Settings("full", compiler=Compiler() if pytestconfig.getoption("--compile") else None)
