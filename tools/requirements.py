"""Prints the requirements of this project's build, or of one of its extras, one a line, for pip.

pip installs an extra only together with the package, which would compile it once more.
"""

import re
import sys
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib


def requirements(project: dict, name: str) -> list[str]:
    """The requirements of the build ("build") or of an extra, with the extras that it names itself resolved."""
    if name == "build":
        return project["build-system"]["requires"] + project["project"]["dependencies"]
    found = []
    for requirement in project["project"]["optional-dependencies"][name]:
        own = re.fullmatch(r"pyperc\[(.+)\]", requirement)
        found += requirements(project, own[1]) if own else [requirement]
    return found


if __name__ == "__main__":
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    print(*(line.replace(" ", "") for line in requirements(tomllib.loads(text), sys.argv[1])), sep="\n")
