"""How fast a pruned network runs: eager, compiled, ONNX Runtime, OpenVINO, CSR and slimnets.

    python examples/benchmarks/speed.py                 # VGG-19, all of it: about half an hour
    python examples/benchmarks/speed.py --quick         # a minute, for a look

All that is compared runs in turn, round by round, in one process; the tables give medians and half
the distance between the quartiles. Ratios are to dense eager PyTorch. The dense runtimes do not
care about zeros, so each is measured once; they run what ``slimnets.export`` writes. Runtimes that
are not installed are left out. VGG-19 is measured with the paper's low-rank pairs as well.

With ``--out``, the figures are written after every batch size and number of threads. Those that
the file already has from the same machine, versions and options are kept and not measured again,
so a run can be stopped and go on, or be done in pieces. To measure anew, delete the file.
"""

import argparse
import json
import statistics
from math import isnan
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from contestants import (
    COMPILED,
    EAGER,
    EXPORTS,
    NETWORKS,
    PACKAGES,
    contestants,
    factorized,
    in_turn,
    ours,
)
from rich.table import Table
from shared import keep, machine, show

Figures = dict[str, Any]


def plural(threads: int) -> str:
    """In words."""
    return f"{threads} thread{'s' * (threads > 1)}"


def summary(times: list[float]) -> dict[str, float]:
    """Median, spread and minimum."""
    low, _, high = statistics.quantiles(times, n=4)
    spread = (high - low) / 2
    return {"median": statistics.median(times), "spread": spread, "min": min(times)}


def combination(figures: Figures, batch: int, threads: int) -> Figures:
    """One batch size and number of threads: a row for each contestant, and reports of ours."""
    torch.set_num_threads(threads)
    name = figures["network"]
    x = torch.randn(batch, *NETWORKS[name][1])
    start = perf_counter()
    with torch.inference_mode():
        calls, reports = contestants(name, x, threads, figures["zeros"], figures["compiled"])
        times = {n: summary(t) for n, t in in_turn(calls, figures["rounds"]).items()}
    print(
        f"batch {batch}, {plural(threads)}: measured in {perf_counter() - start:.0f} s", flush=True
    )
    dense = times[EAGER]["median"]
    rows = [{"name": n, "ratio": dense / t["median"], **t} for n, t in times.items()]
    return {"batch": batch, "threads": threads, "rows": rows, "reports": reports}


class Results:
    """Finds what was measured.

    Args:
        figures: As they are in the file.
    """

    def __init__(self, figures: Figures) -> None:
        self.parts = {(p["threads"], p["batch"]): p for p in figures["combinations"]}
        self.rows = {
            (*key, r["name"]): r for key in sorted(self.parts) for r in self.parts[key]["rows"]
        }
        self.threads = sorted({threads for threads, _ in self.parts})
        self.batches = sorted({batch for _, batch in self.parts})
        self.names = list(dict.fromkeys(name for *_, name in self.rows))
        self.zeros = figures["zeros"]

    def get(self, threads: int, batch: int, name: str, what: str) -> float:
        """NaN if it was not measured."""
        return float(self.rows.get((threads, batch, name), {}).get(what, float("nan")))

    def best_dense(self, threads: int, batch: int) -> float:
        """The ratio of the fastest runtime that computes the zeros."""
        dense = [n for n in (EAGER, COMPILED, *EXPORTS) if n in self.names]
        return max(self.get(threads, batch, name, "ratio") for name in dense)


def grid(title: str, columns: list[str], rows: dict[str, list[str]]) -> Table:
    """A table with a name before every row."""
    shown = Table(title=title)
    shown.add_column("")
    for column in columns:
        shown.add_column(column, justify="right")
    for name, cells in rows.items():
        shown.add_row(name, *cells)
    return shown


def speedup(ratio: float) -> str:
    """Nothing for what was not measured."""
    return "" if isnan(ratio) else f"{ratio:.2f}x"


def tables(figures: Figures) -> list[Table]:
    """Speed-up for each number of threads; threads against one; exports against the dense one."""
    found = Results(figures)
    shown = [_speedups(found, threads) for threads in found.threads]
    if 1 in found.threads:
        shown += [_threads_against_one(found, threads) for threads in found.threads if threads > 1]
    if any(factorized(name) in found.names for name in EXPORTS):
        shown.append(_exports_against_dense(found))
    return shown


def _speedups(found: Results, threads: int) -> Table:
    def cell(batch: int, name: str) -> str:
        ratio, *times = (
            found.get(threads, batch, name, what) for what in ("ratio", "median", "spread")
        )
        text = speedup(ratio)
        return f"{text} ({times[0]:.2f} ± {times[1]:.2f})" if text else ""

    return grid(
        f"{plural(threads)}, speed-up over dense eager PyTorch (ms ± half the interquartile range)",
        [f"batch {batch}" for batch in found.batches],
        {name: [cell(batch, name) for batch in found.batches] for name in found.names},
    )


def _threads_against_one(found: Results, threads: int) -> Table:
    def cell(batch: int, name: str) -> str:
        one, several = (found.get(count, batch, name, "median") for count in (1, threads))
        return speedup(one / several)

    names = [n for n in found.names if n == EAGER or n.startswith("slimnets")]
    return grid(
        f"{plural(threads)}, times as fast as one",
        [f"batch {batch}" for batch in found.batches],
        {name: [cell(batch, name) for batch in found.batches] for name in names},
    )


def _exports_against_dense(found: Results) -> Table:
    keys = [(threads, batch) for threads in found.threads for batch in found.batches]

    def cell(key: tuple[int, int], name: str) -> str:
        dense, pairs = (found.get(*key, n, "median") for n in (name, factorized(name)))
        return speedup(dense / pairs)

    names = [n for n in (EAGER, *EXPORTS) if factorized(n) in found.names]
    return grid(
        "The factorized network, times as fast as the dense one in the same runtime",
        [f"batch {batch}, {plural(threads)}" for threads, batch in keys],
        {name: [cell(key, name) for key in keys] for name in names},
    )


def plot(figures: Figures, path: Path) -> None:
    """Speed-up against sparsity, one panel for each number of threads."""
    from matplotlib.figure import Figure

    found = Results(figures)
    labels = [f"{100 * zeros:g}" for zeros in found.zeros]
    figure = Figure(figsize=(5 * len(found.threads), 4), layout="constrained")
    panels = figure.subplots(1, len(found.threads), squeeze=False, sharey=True)[0]
    for axes, threads in zip(panels, found.threads, strict=True):
        for batch in found.batches:
            ratios = [found.get(threads, batch, ours(z), "ratio") for z in found.zeros]
            (line,) = axes.plot(labels, ratios, "o-", label=f"batch {batch}")
            best = found.best_dense(threads, batch)
            axes.axhline(best, color=line.get_color(), linestyle=":")
        axes.axhline(1.0, color="black", linewidth=0.5)
        axes.set(xlabel="zeros, %", ylabel="times as fast as dense eager", yscale="log")
        ticks = [tick for tick in (1, 2, 5, 10, 20, 50) if tick < 1.2 * axes.get_ylim()[1]]
        axes.set_yticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set_title(f"{plural(threads)} (dotted: the best dense runtime)", fontsize="medium")
        axes.legend()
    figure.savefig(path, dpi=110)


def begin(path: Path | None, figures: Figures) -> Figures:
    """The figures of ``path`` where they were measured in the same way, else the empty ones."""
    if path is None or not path.exists():
        return figures
    found: Figures = json.loads(path.read_text())
    differ = [key for key in figures if key != "combinations" and found.get(key) != figures[key]]
    if differ:
        print(f"{path} is of another {', '.join(differ)}: all is measured anew")
        return figures
    return found


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write JSON, tables and a plot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", choices=NETWORKS, default="vgg19")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--zeros", type=float, nargs="+", default=[0, 0.5, 0.8, 0.9, 0.95, 0.98])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--quick", action="store_true", help="a tiny network, few rounds")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for speed-NETWORK.json, .md and .png; what the JSON already has from this "
        "machine, these versions and options is kept and not measured again",
    )
    options = parser.parse_args(arguments)
    if options.quick:
        options.network, options.batches, options.threads = "tiny", [1, 2], [1]
        options.zeros, options.rounds, options.no_compile = [0.0, 0.9], 4, True
    figures = {
        "machine": machine(*PACKAGES),
        "network": options.network,
        "zeros": options.zeros,
        "rounds": options.rounds,
        "compiled": not options.no_compile,
        "combinations": [],
    }
    print(json.dumps(figures["machine"], indent=2))
    file = f"speed-{options.network}"
    figures = begin(options.out and options.out / f"{file}.json", figures)
    for threads in options.threads:
        for batch in options.batches:
            if (threads, batch) in Results(figures).parts:
                print(f"batch {batch}, {plural(threads)}: kept", flush=True)
                continue
            figures["combinations"].append(combination(figures, batch, threads))
            if options.out:
                keep(options.out, file, figures, *tables(figures))
                plot(figures, options.out / f"{file}.png")
    for one in tables(figures):
        show(one)


if __name__ == "__main__":
    main()
