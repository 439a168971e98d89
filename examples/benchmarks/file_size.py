"""Bytes of a pruned VGG-19 in every form that a user would pick, and what theory allows.

    python examples/benchmarks/file_size.py

Needs nothing but slimnets; with Python before 3.14, zstd needs ``pip install zstandard``.
"""

import argparse
import copy
import logging
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from file_forms import forms, zstd
from rich.table import Table
from shared import keep, machine, random_vgg19, show
from torch import Tensor, nn

import slimnets
from slimnets.artifact.quantize import quantize


def limit(state: Mapping[str, Tensor], dtype: torch.dtype) -> float:
    """Bytes of ``nnz * bits(value) + n * H(sparsity)``; of int8, the entropy of the values.

    Names, shapes and the scales of int8 are allowed nothing.
    """
    total = 0.0
    for tensor in state.values():
        stored = (
            tensor.to(dtype) if dtype.is_floating_point and tensor.is_floating_point() else tensor
        )
        quantized = quantize(tensor, 0) if dtype is torch.int8 else None
        if quantized:
            stored = quantized[0]
            total += entropy(stored[stored != 0].unique(return_counts=True)[1]) / 8
        else:
            total += int(stored.count_nonzero()) * stored.itemsize
        nonzeros = int(stored.count_nonzero())
        total += entropy(torch.tensor([nonzeros, stored.numel() - nonzeros])) / 8
    return total


def entropy(counts: Tensor) -> float:
    """Bits of as many symbols as ``counts`` sum up to."""
    counts = counts[counts > 0].double()
    return float((counts * (counts.sum() / counts).log2()).sum())


def measure(network: nn.Module, rounds: int, folder: Path) -> list[dict[str, Any]]:
    """Bytes and times of every form, in turn, ``rounds`` times over."""
    compared = forms()
    prepared = [form.prepare(network) for form in compared]
    blank = copy.deepcopy(network)
    for parameter in blank.parameters():
        parameter.data.zero_()
    times: dict[str, list[tuple[float, float]]] = {form.name: [] for form in compared}
    sizes = {}
    for _ in range(rounds):
        for form, source in zip(compared, prepared, strict=True):
            path = folder / "file"
            target = form.prepare(copy.deepcopy(blank))
            start = time.perf_counter()
            form.save(source, path)
            middle = time.perf_counter()
            form.load(path, target)
            times[form.name].append((middle - start, time.perf_counter() - middle))
            sizes[form.name] = path.stat().st_size
            if form.dtype is torch.float32:
                check_equal(source, target, form.name)
    limits = {dtype: limit(network.state_dict(), dtype) for dtype in {f.dtype for f in compared}}
    dense = times["torch.save"]
    results = []
    for form in compared:
        row: dict[str, Any] = {"form": form.name, "bytes": sizes[form.name]}
        row["limit"] = round(limits[form.dtype])
        row["of_limit"] = row["bytes"] / limits[form.dtype]
        for i, what in enumerate(("save", "load")):
            own = [one[i] for one in times[form.name]]
            ratios = [a / b[i] for a, b in zip(own, dense, strict=True)]
            row[f"{what}_ratio"] = statistics.median(ratios)
            row[f"{what}_ratio_spread"] = [min(ratios), max(ratios)]
            row[f"{what}_seconds"] = statistics.median(own)
        results.append(row)
    return results


def check_equal(source: nn.Module, target: nn.Module, form: str) -> None:
    """Exit with an error unless ``target`` is a copy of ``source``."""
    loaded = target.state_dict()
    for name, tensor in source.state_dict().items():
        if not torch.equal(tensor, loaded[name]):
            raise SystemExit(f"{form}: {name} did not come back bit for bit")


def check_sizes(results: list[dict[str, Any]]) -> None:
    """Exit with an error unless our files are as small as they are said to be."""
    peers = [row["bytes"] for row in results if not row["form"].startswith("slimnets")]
    for row in results:
        if row["form"].startswith("slimnets"):
            most = 1.02 if "int8" in row["form"] else 1.01
            if row["of_limit"] > most or row["bytes"] > min(peers):
                raise SystemExit(f"{row['form']}: {row['bytes']} bytes are too many")


def table(results: Mapping[float, list[dict[str, Any]]], title: str, caption: str) -> Table:
    """One section per sparsity, one row per form."""
    shown = Table(title=title, caption=caption)
    shown.add_column("zeros", justify="right", no_wrap=True)
    shown.add_column("form", no_wrap=True)
    for heading in ("bytes", "of the limit", "time to save", "spread", "to load", "spread"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for sparsity, rows in results.items():
        for i, row in enumerate(rows):
            timing = []
            for what in ("save", "load"):
                low, high = row[f"{what}_ratio_spread"]
                timing += [f"{row[f'{what}_ratio']:.2f}", f"{low:.2f} to {high:.2f}"]
            zeros = "" if i else f"{100 * sparsity:g} %"
            shown.add_row(
                zeros, row["form"], f"{row['bytes']:,}", f"{row['of_limit']:.3f}", *timing
            )
        limits = {row["form"]: row["limit"] for row in rows}
        for dtype in ("", ", float16", ", int8"):
            bytes_of = (f"{limits['slimnets.save' + dtype]:,}", "1.000")
            shown.add_row("", f"limit{dtype or ', float32'}", *bytes_of, *[""] * 4)
        shown.add_section()
    return shown


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the table, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--sparsity", type=float, nargs="+", default=[0.5, 0.8, 0.9, 0.95, 0.99, 0.995]
    )
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each time")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="folder for file_size.json and file_size.md")
    parser.add_argument("--quick", action="store_true", help="a narrow network, each time once")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # what was rounded
    for message in ("Sparse CSR tensor support is in beta", "Validating sparse tensor invariants"):
        warnings.filterwarnings("ignore", message=message)
    if options.quick:
        options.rounds, options.sparsity = 1, [0.5, 0.9]
    results: dict[float, list[dict[str, Any]]] = {}
    for sparsity in options.sparsity:
        torch.manual_seed(0)
        network = random_vgg19(0.25 if options.quick else 1)
        slimnets.prune(network, sparsity)
        with tempfile.TemporaryDirectory() as folder:
            results[sparsity] = measure(network, options.rounds, Path(folder))
        check_sizes(results[sparsity])
    measured_on = machine("numpy", "safetensors")
    count = sum(p.numel() for p in network.parameters())
    dense = next(iter(results.values()))[0]
    caption = (
        f"times relative to torch.save and torch.load ({dense['save_seconds']:.2f} s and "
        f"{dense['load_seconds']:.2f} s), median of {options.rounds} rounds in "
        f"turn; {options.threads} thread(s) of {os.cpu_count()}; "
        + ", ".join(f"{name} {number}" for name, number in measured_on.items())
    )
    if not zstd:
        caption += "; zstd left out: pip install zstandard"
    title = f"VGG-19, {count / 1e6:.1f} M weights, pruned by magnitude"
    shown = table(results, title, caption)
    show(shown)
    if options.out:
        figures = {"weights": count, "threads": options.threads, "machine": measured_on}
        figures["results"] = [row | {"sparsity": s} for s, rows in results.items() for row in rows]
        keep(options.out, "file_size", figures, shown)


if __name__ == "__main__":
    main()
