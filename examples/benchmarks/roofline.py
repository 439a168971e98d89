"""How near the sparse kernel comes to what this processor can do, layer by layer.

    python examples/benchmarks/roofline.py              # VGG-19, one thread: some minutes

A layer's rate counts two operations for every non-zero weight, pixel and sample. Its intensity is
those operations over the bytes that it cannot do without: its input and output, and a value and an
offset for every non-zero. The roof above it is the lower of two: the rate of a large dense matrix
product in PyTorch, and its intensity times the bandwidth of a triad over as many bytes as one pass
over the whole network touches, so from a cache where they fit into one. Layers that ``accelerate``
computes in another way have no figures. Steps are timed one by one, at their best; the whole
network as a user calls it, in the median.
"""

import argparse
import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from contestants import NETWORKS, PACKAGES, calls_within, in_turn, pruned
from rich.table import Table
from shared import keep, machine, show
from torch import nn

from slimnets.acceleration import accelerate
from slimnets.acceleration.region import Region
from slimnets.acceleration.steps import Conv, Linear
from slimnets.acceleration.weights import Matrix

MEMORY_BYTES = 384 << 20
BYTES_OF_NONZERO = 8
Figures = dict[str, Any]


def peak_gflops(size: int = 2048, rounds: int = 7) -> float:
    """GFLOP/s of a dense matrix product."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    return 2e-6 * size**3 / min(in_turn({"product": lambda: a @ b}, rounds)["product"])


def bandwidth(touched: int, rounds: int = 7) -> float:
    """GB/s of ``a = b + s * c`` where the three together take this many bytes."""
    count = max(1024, touched // 12)
    b, c, a = torch.ones(count), torch.ones(count), torch.empty(count)

    def triad() -> None:
        torch.add(b, c, alpha=2.0, out=a)

    return 12e-6 * count / min(in_turn({"triad": triad}, rounds)["triad"])


def nonzeros(found: Iterable[tuple[Region, Any]]) -> dict[str, int]:
    """Of each layer that the sparse kernel computes, after channels have been removed."""
    counts = {}
    for region, _ in found:
        for step in region.steps:
            if isinstance(step, Conv) and not isinstance(step.weight, Matrix):
                counts[step.name] = step.weight.products
            elif isinstance(step, Linear):
                counts[step.name] = int((step.weight != 0).sum())
    return counts


def profile(found: Iterable[tuple[Region, Any]], rounds: int) -> dict[str, float]:
    """Median seconds of every step."""
    times: dict[str, list[float]] = {}
    for region, arguments in found:
        for _ in range(rounds):
            for name, seconds in region.profile(*arguments).items():
                times.setdefault(name, []).append(seconds)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def measure(name: str, zeros: float, batch: int, rounds: int, peak: float) -> Figures:
    """Every layer of the network with this share of zeros, for one batch size."""
    x = torch.randn(batch, *NETWORKS[name][1])
    network = pruned(name, zeros)
    fast = accelerate(network, x)
    parts = [(region, args) for _, region, args, _ in calls_within(fast.fast or fast, x, Region)]
    counts, seconds = nonzeros(parts), profile(parts, rounds)
    calls = calls_within(network, x, nn.Conv2d, nn.Linear)
    sizes = {layer: (args[0].shape, output.shape) for layer, _, args, output in calls}
    layers = []
    for layer, (source, target) in sizes.items():
        if layer not in counts:
            continue
        pixels = target.numel() // target[1]
        floats = source.numel() + target.numel()
        layers.append(
            {
                "layer": layer,
                "shape": f"{source[1]} to {target[1]}"
                + (f" @ {target[2]} x {target[3]}" if len(target) > 2 else ""),
                "seconds": seconds[layer],
                "operations": 2 * counts[layer] * pixels,
                "bytes": 4 * floats + BYTES_OF_NONZERO * counts[layer],
            }
        )
    touched = sum(row["bytes"] for row in layers)
    gbytes = bandwidth(touched)
    for row in layers:
        row["gflops"] = row["operations"] / row["seconds"] / 1e9
        row["intensity"] = row["operations"] / row["bytes"]
        row["of_peak"] = row["gflops"] / peak
        row["bound_by"] = "compute" if row["intensity"] * gbytes > peak else "memory"
        row["of_bound"] = row["gflops"] / min(peak, row["intensity"] * gbytes)
    whole = statistics.median(in_turn({"": lambda: fast(x)}, rounds)[""]) / 1e3
    return {
        "zeros": zeros,
        "batch": batch,
        "bytes": touched,
        "bandwidth": gbytes,
        "seconds": whole,
        "seconds_in_layers": sum(row["seconds"] for row in layers),
        "seconds_in_other_steps": sum(t for step, t in seconds.items() if step not in sizes),
        "layers": layers,
    }


def tables(figures: Figures) -> list[Table]:
    """One for each batch size, and what they are measured against."""
    shown = []
    for batch in dict.fromkeys(run["batch"] for run in figures["runs"]):
        runs = [run for run in figures["runs"] if run["batch"] == batch]
        table = Table(title=f"GFLOP/s (share of its bound, c: compute, m: memory), batch {batch}")
        table.add_column("layer")
        table.add_column("channels, image")
        names: dict[str, str] = {}
        for run in runs:
            names |= {row["layer"]: row["shape"] for row in run["layers"]}
            table.add_column(f"{100 * run['zeros']:g} %", justify="right")
        for layer, shape in names.items():
            table.add_row(layer, shape, *(_cell(run, layer) for run in runs))
        totals = [sum(r["operations"] for r in run["layers"]) / 1e9 for run in runs]
        pairs = zip(totals, runs, strict=True)
        rates = [f"{total / run['seconds_in_layers']:.0f}" for total, run in pairs]
        table.add_row("all of them", "", *rates)
        for label, what in (
            ("ms in these layers", "seconds_in_layers"),
            ("ms in pooling, the way in and out", "seconds_in_other_steps"),
            ("ms of the whole network", "seconds"),
        ):
            table.add_row(label, "", *(f"{1e3 * run[what]:.2f}" for run in runs))
        table.add_row("triad, GB/s", "", *(f"{run['bandwidth']:.0f}" for run in runs))
        shown.append(table)
    return shown


def _cell(run: Figures, layer: str) -> str:
    for row in run["layers"]:
        if row["layer"] == layer:
            rate = f"{row['gflops']:.{int(row['gflops'] < 10)}f}"
            return f"{rate} ({row['of_bound']:.0%} {row['bound_by'][0]})"
    return ""


def plot(figures: Figures, path: Path) -> None:
    """The roofs, and a point for each layer; a panel for each batch size."""
    from matplotlib.figure import Figure

    batches = list(dict.fromkeys(run["batch"] for run in figures["runs"]))
    figure = Figure(figsize=(4 * len(batches), 4), layout="constrained")
    panels = figure.subplots(1, len(batches), squeeze=False, sharex=True, sharey=True)[0]
    peak, rows = figures["peak_gflops"], [r for run in figures["runs"] for r in run["layers"]]
    low, high = min(r["intensity"] for r in rows) / 1.5, 1.5 * max(r["intensity"] for r in rows)
    cache = max(run["bandwidth"] for run in figures["runs"])
    roofs = (("memory", figures["memory_bandwidth"], "-"), ("cache", cache, "--"))
    for axes, batch in zip(panels, batches, strict=True):
        for label, gbytes, style in roofs:
            knee = min(max(low, peak / gbytes), high)
            line = [min(peak, i * gbytes) for i in (low, knee, high)]
            name = f"{label}, {gbytes:.0f} GB/s"
            axes.plot((low, knee, high), line, style, color="black", linewidth=1, label=name)
        for run in [run for run in figures["runs"] if run["batch"] == batch]:
            points = [(r["intensity"], r["gflops"]) for r in run["layers"]]
            axes.plot(
                *zip(*points, strict=True), "o", ms=4, label=f"{100 * run['zeros']:g} % zeros"
            )
        axes.set(xscale="log", yscale="log", xlabel="operations per byte", title=f"batch {batch}")
        axes.legend(fontsize="small", loc="lower right")
    panels[0].set_ylabel(f"GFLOP/s (dense peak: {peak:.0f})")
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write JSON, tables and a plot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", choices=NETWORKS, default="vgg19")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--zeros", type=float, nargs="+", default=[0.9, 0.95, 0.98])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="a tiny network, few rounds")
    parser.add_argument("--out", type=Path, help="folder for roofline.json, .md and .png")
    options = parser.parse_args(arguments)
    if options.quick:
        options.network, options.batches, options.rounds = "tiny", [2], 2
    torch.set_num_threads(1)
    figures: Figures = {
        "machine": machine(*PACKAGES),
        "network": options.network,
        "peak_gflops": peak_gflops(),
        "memory_bandwidth": bandwidth(MEMORY_BYTES),
        "runs": [],
    }
    print(json.dumps({k: v for k, v in figures.items() if k != "runs"}, indent=2))
    with torch.inference_mode():
        for batch in options.batches:
            for zeros in options.zeros:
                run = measure(options.network, zeros, batch, options.rounds, figures["peak_gflops"])
                figures["runs"].append(run)
    for one in (shown := tables(figures)):
        show(one)
    if options.out:
        keep(options.out, "roofline", figures, *shown)
        plot(figures, options.out / "roofline.png")


if __name__ == "__main__":
    main()
