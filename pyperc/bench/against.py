"""A run beside an earlier one: what became faster, what slower."""

from typing import Any

from pyperc.bench.cases import Record
from pyperc.bench.text import Table, duration, times

__all__ = ["table"]

Key = tuple[str, str, str, int, str]


def table(now: dict[str, Any], then: dict[str, Any]) -> Table:
    """Time then over time now of the cases that both hold, in units of the probes beside them.

    Eager torch, which did not change, shows how far the two runs can be compared.
    """
    found = Table(
        f"Against the run of {then['date'][:16].replace('T', ' ')}: time then over time now, scaled by the FMA peak",
        ["", "pyperc", "eager", "then", "now"],
    )
    before = cases(then)
    for key, record in cases(now).items():
        if key in before:
            old = before[key]
            seconds = [r["contenders"]["pyperc"]["seconds"] for r in (old, record)]
            row = [f"{key[0]}: {key[1]}, {key[2]}", times(gain(old, record, "pyperc"))]
            found.rows.append([*row, f"{gain(old, record, 'eager'):.2f}", *map(duration, seconds)])
    if not found.rows:
        found.notes.append("The two runs have no case in common.")
    return found


def cases(result: dict[str, Any]) -> dict[Key, Record]:
    """By what tells them apart."""
    return {
        (r["table"], r["case"], r["work"], r["threads"], r["isa"]): r
        for r in result["records"]
        if {"pyperc", "eager"} <= r.get("contenders", {}).keys()
    }


def gain(then: Record, now: Record, name: str) -> float:
    """Time then over time now, each in operations at the peak."""
    old, new = (float(r["contenders"][name]["seconds"]) * float(r["probe"]) for r in (then, now))
    return old / new
