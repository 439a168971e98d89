"""What was chosen for each layer, and what it gained."""

from dataclasses import asdict, dataclass, field
from typing import Any

from rich.table import Table
from rich.text import Text

from slimnets.text import as_text


@dataclass(frozen=True)
class Row:
    """One layer.

    Attributes:
        name: Its name in the network.
        kind: Its type.
        sparsity: Share of its weights that are zero, in [0, 1].
        choice: How it is computed now.
        before: Milliseconds that PyTorch takes for it on the example.
        after: Milliseconds that it takes now; what was folded into it is counted here.
    """

    name: str
    kind: str
    sparsity: float
    choice: str
    before: float
    after: float

    @property
    def speedup(self) -> float:
        """How many times faster it has become."""
        return self.before / self.after if self.after else float("inf")


@dataclass
class Report:
    """What ``accelerate`` did, measured on the example.

    Attributes:
        rows: One for each convolution and linear layer.
        before: Milliseconds for the whole network in PyTorch.
        after: Milliseconds for the whole network now.
        threads: Threads that it was measured with.
        tried: Milliseconds of every variant of the network that was tried.
        note: What else there is to say.
    """

    rows: list[Row] = field(default_factory=list)
    before: float = 0.0
    after: float = 0.0
    threads: int = 1
    tried: dict[str, float] = field(default_factory=dict)
    note: str = ""

    @property
    def speedup(self) -> float:
        """How many times faster the whole network has become."""
        return self.before / self.after if self.after else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain types."""
        return asdict(self)

    def __rich__(self) -> Table:
        plural = "s" if self.threads > 1 else ""
        caption = Text(self.note) if self.note else None
        title = f"Accelerated, {self.threads} thread{plural}"
        table = Table(title=title, caption=caption, show_footer=True)
        table.add_column("layer", footer="all")
        table.add_column("type")
        table.add_column("sparsity", justify="right")
        table.add_column("computed by")
        for name, total in zip(("before, ms", "now, ms", "speedup"), _times(self), strict=True):
            table.add_column(name, footer=total, justify="right")
        for row in self.rows:
            cells = (row.name, row.kind, f"{row.sparsity:.1%}", row.choice, *_times(row))
            table.add_row(*map(Text, cells))  # no part of a name is markup
        return table

    def __str__(self) -> str:
        return as_text(self, width=110)


def _times(one: Row | Report) -> tuple[str, str, str]:
    return f"{one.before:.3f}", f"{one.after:.3f}", f"{one.speedup:.1f}x"
