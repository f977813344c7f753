"""Tables as text to read and as Markdown."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["Table", "duration", "of_peak", "operations", "size", "times"]


@dataclass
class Table:
    """Rows under a header; the first column is text, the others are figures."""

    title: str
    header: Sequence[str]
    rows: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def text(self) -> str:
        """Columns of equal width."""
        lines = [self.title]
        if self.rows:
            widths = [max(map(len, column)) for column in zip(self.header, *self.rows, strict=True)]
            for row in [list(self.header), *self.rows]:
                cells = [
                    cell.ljust(w) if i == 0 else cell.rjust(w)
                    for i, (cell, w) in enumerate(zip(row, widths, strict=True))
                ]
                lines.append("  " + "  ".join(cells).rstrip())
        lines += [textwrap.fill(note, 118, initial_indent="  ", subsequent_indent="  ") for note in self.notes]
        return "\n".join(lines)

    def markdown(self) -> str:
        """A title, a table, the notes."""
        parts = [f"**{self.title}**"]
        if self.rows:
            align = ["---", *["---:"] * (len(self.header) - 1)]
            rows = [list(self.header), align, *self.rows]
            parts.append("\n".join("| " + " | ".join(row) + " |" for row in rows))
        return "\n\n".join([*parts, *(textwrap.fill(note, 120) for note in self.notes)])


def times(ratio: float | None) -> str:
    """A ratio; a loss is marked."""
    if ratio is None:
        return "-"
    return f"{ratio:.2f}" + (" (slower)" if ratio < 0.995 else "")


def duration(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def of_peak(share: float) -> str:
    return f"{share:.0%}"


def size(count: float) -> str:
    """Bytes, for people."""
    for scale, unit in ((2**20, "MiB"), (2**10, "KiB")):
        if abs(count) >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count:.0f} B"


def operations(count: float) -> str:
    """Floating-point operations, for people."""
    for scale, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f}"
