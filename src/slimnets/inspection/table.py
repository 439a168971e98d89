"""Rows of numbers as a table, for a terminal and in Markdown."""

from collections.abc import Iterable, Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from slimnets.inspection.rows import Row
from slimnets.text import as_text

Cells = Sequence[str]

HEADERS: Mapping[str, str] = {
    "name": "layer",
    "kind": "type",
    "weights": "weights",
    "nonzeros": "non-zeros",
    "sparsity": "sparsity",
    "rank": "rank",
    "dead_channels": "dead",
    "macs": "MACs",
    "effective_macs": "effective",
    "bytes": "bytes",
}


def columns(rows: Iterable[Row]) -> list[str]:
    """The fields that one of ``rows`` has something to say about."""
    optional = {"rank", "dead_channels", "macs", "effective_macs"}
    told = {field for row in rows for field in optional if getattr(row, field)}
    return [field for field in HEADERS if field not in optional - told]


def folded(rows: Iterable[Row]) -> list[Row]:
    """``rows`` with those of layers without weights, norms for the most part, folded into one."""
    shown: list[Row] = []
    others: list[Row] = []
    for row in rows:
        counts = row.weights or row.macs or " tied to " in row.kind
        (shown if counts else others).append(row)
    if others:
        kinds = ", ".join(dict.fromkeys(row.kind for row in others))
        size = sum(row.bytes for row in others)
        shown.append(Row(f"{len(others)} without weights", kinds, bytes=size))
    return shown


def cells(row: Row, fields: Iterable[str]) -> list[str]:
    """What the table shows of ``row``."""
    return [_cell(row, field) for field in fields]


def text(fields: Sequence[str], body: Sequence[Cells], feet: Sequence[Cells], notes: Cells) -> str:
    """The table for a terminal."""
    table = Table(box=SIMPLE_HEAD)
    for field in fields:
        table.add_column(HEADERS[field], justify="left" if field in ("name", "kind") else "right")
    for row in body:
        table.add_row(*row)
    table.add_section()
    for row in feet:
        table.add_row(*row)
    # as wide as it needs to be
    lines = [line.rstrip() for line in as_text(table, width=10_000).strip("\n").splitlines()]
    return "\n".join([*lines, *(f"  {note}" for note in notes)])


def markdown(
    fields: Sequence[str], body: Sequence[Cells], feet: Sequence[Cells], notes: Cells
) -> str:
    """The table in Markdown."""
    rule = [":--" if field in ("name", "kind") else "--:" for field in fields]
    bold = [[f"**{cell}**" if cell else "" for cell in row] for row in feet]
    lines = [[HEADERS[field] for field in fields], rule, *body, *bold]
    shown = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return "\n\n".join([shown, *notes])


def scaled(value: float, unit: str) -> str:
    """``value`` to three digits with an SI prefix.

    Examples:
        >>> scaled(20_600_000, "B"), scaled(0.00124, "s"), scaled(512, "B")
        ('20.6 MB', '1.24 ms', '512 B')
    """
    if unit != "s" and value < 999.5:
        return f"{value:.0f} {unit}".rstrip()
    prefixes = (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1.0), ("m", 1e-3))
    fitting = (one for one in prefixes if value >= 0.9995 * one[1])
    prefix, factor = next(fitting, ("µ", 1e-6))
    return f"{_digits(value / factor)} {prefix}{unit}".rstrip()


def times(ratio: float) -> str:
    """A ratio to three digits: 12.3x."""
    return f"{_digits(ratio)}x"


def _digits(value: float) -> str:
    decimals = 0 if value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:,.{decimals}f}"


def _cell(row: Row, field: str) -> str:
    value = getattr(row, field)
    if isinstance(value, str):
        return value or "(root)"
    if not row.weights and field in ("weights", "nonzeros", "sparsity"):
        return ""
    if field == "sparsity":
        return f"{value:.1%}"
    if field in ("macs", "effective_macs"):
        return scaled(value, "") if value else ""
    if field == "bytes":
        return f"{value:,}"
    return f"{value:,}" if value else ""
