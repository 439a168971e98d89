"""What a compression run ends with: the dense network against the compressed one."""

from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import nn

from slimnets import summarize


def report(
    dense: nn.Module,
    compressed: nn.Module,
    accelerated: nn.Module,
    example_input: Any,
    *,
    accuracies: tuple[float, float],
    files: tuple[Path, Path],
) -> None:
    """Print every layer of ``compressed``, and a table that compares it with ``dense``.

    Args:
        dense: The network before compression.
        compressed: The network as it was loaded from its file.
        accelerated: The same after ``slimnets.accelerate``.
        example_input: What both are timed on.
        accuracies: Of the dense and the compressed network, in [0, 1].
        files: Of the dense and the compressed network.
    """
    summary = summarize(compressed, example_input, baseline=dense)
    baseline, ratios = summary.baseline, summary.ratios
    bytes_dense, bytes_compressed = (file.stat().st_size for file in files)

    table = Table("", title="dense against compressed", box=SIMPLE_HEAD)
    for heading in ("dense", "compressed", "ratio"):
        table.add_column(heading, justify="right")
    change = 100 * (accuracies[1] - accuracies[0])
    table.add_row("accuracy", *(f"{one:.2%}" for one in accuracies), f"{change:+.2f} points")
    for name, field in (("weights", "weights"), ("non-zeros", "nonzeros")):
        counts = (getattr(one.total, field) for one in (baseline, summary))
        table.add_row(name, *(f"{count:,}" for count in counts), f"{ratios[field]:.1f}x fewer")
    ratio = bytes_dense / bytes_compressed
    table.add_row("bytes", f"{bytes_dense:,}", f"{bytes_compressed:,}", f"{ratio:.1f}x smaller")
    fast = summarize(accelerated, example_input, baseline=dense)
    for name, one in (("latency", summary), ("accelerated", fast)):
        medians = (each.latency.median for each in (one.baseline, one))
        faster = f"{one.ratios['latency']:.1f}x as fast"
        table.add_row(name, *(f"{1000 * median:.2f} ms" for median in medians), faster)

    print(f"\n{summary}\n")
    Console(highlight=False).print(table)
