"""How fast a pruned network runs: eager, compiled, ONNX Runtime, OpenVINO, CSR and slimnets.

    python examples/benchmarks/speed.py                 # VGG-19, all of it: about half an hour
    python examples/benchmarks/speed.py --quick         # a few seconds, for a look

All that is compared runs in turn, round by round, in one process; the table gives medians and, in
brackets, half the distance between the quartiles. Ratios are to dense eager PyTorch. The dense
runtimes do not care about zeros, so each is measured once. Runtimes that are not installed are
left out.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from rich.table import Table
from shared import VGG, keep, machine, show
from torch import nn

from slimnets.acceleration import accelerate, export
from slimnets.acceleration.attention import Swapped
from slimnets.acceleration.dense import csr
from slimnets.layers import replace

PACKAGES = ("numba", "onnxruntime", "openvino")
EAGER = "PyTorch eager"
Call = Callable[[], Any]


def resnet18() -> nn.Module:
    """ResNet-18 for 224 by 224 images."""
    import torchvision

    return torchvision.models.resnet18()  # type: ignore[no-any-return]


def transformer() -> nn.Module:
    """Two encoder layers of width 512."""
    layer = nn.TransformerEncoderLayer(512, 8, 2048, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "vgg19": (lambda: VGG(19), (3, 32, 32)),
    "resnet18": (resnet18, (3, 224, 224)),
    "transformer": (transformer, (128, 512)),
    "tiny": (lambda: VGG(19, width=1 / 8), (3, 32, 32)),
}


def pruned(name: str, zeros: float) -> nn.Module:
    """The network with this share of random zeros in every layer, scaled to keep its signal."""
    torch.manual_seed(0)
    network = NETWORKS[name][0]().eval().requires_grad_(False)
    for parameter in network.parameters():
        if parameter.dim() > 1 and zeros:
            order = torch.randperm(parameter.numel())[: round(zeros * parameter.numel())]
            parameter.view(-1)[order] = 0.0
            parameter /= (1.0 - zeros) ** 0.5
    return network


def with_csr(network: nn.Module, x: torch.Tensor) -> nn.Module:
    """``network`` with a CSR product in the place of every layer that it makes faster."""
    inputs: dict[str, torch.Tensor] = {}
    layers = {n: m for n, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    hooks = [
        m.register_forward_pre_hook(lambda _, args, n=n: inputs.update({n: args[0]}))
        for n, m in layers.items()
    ]
    network(x)
    for hook in hooks:
        hook.remove()
    for name in inputs:
        layer, image = layers[name], inputs[name]
        product = csr(layer, image, relu=False)
        if product is not None:
            pair = {"dense": partial(layer, image), "csr": partial(product, image)}
            times = in_turn(pair, 3)
            if min(times["csr"]) < min(times["dense"]):
                network = replace(network, name, Swapped(layer, product))
    return network


def onnx_runtime(path: Path, x: torch.Tensor, threads: int) -> Call:
    """The exported network in ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, feed)


def openvino(path: Path, x: torch.Tensor, threads: int, exact: bool) -> Call:
    """The exported network in OpenVINO, in float32 or in its default precision."""
    import openvino as ov

    settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    if exact:
        settings["INFERENCE_PRECISION_HINT"] = "f32"
    request = ov.Core().compile_model(path, "CPU", settings).create_infer_request()
    array = x.numpy()
    return lambda: request.infer([array])


def contestants(
    name: str, x: torch.Tensor, threads: int, sparsities: list[float], compiled: bool
) -> tuple[dict[str, Call], dict[str, Any]]:
    """Everything to compare, by name; and the reports of ours."""
    dense = pruned(name, 0.0)
    calls: dict[str, Call] = {EAGER: lambda: dense(x)}
    reports = {}
    if compiled:
        faster = torch.compile(dense)
        calls["torch.compile"] = lambda: faster(x)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        for label, make in (
            ("ONNX Runtime", lambda: onnx_runtime(path, x, threads)),
            ("OpenVINO f32", lambda: openvino(path, x, threads, True)),
            ("OpenVINO default", lambda: openvino(path, x, threads, False)),
        ):
            try:
                if not path.exists():
                    export(dense, x, path)
                calls[label] = make()
            except ImportError as missing:
                print(f"{label} is left out: {missing}", file=sys.stderr)
    for zeros in sparsities:
        fast = accelerate(pruned(name, zeros), x)
        reports[f"{zeros:.0%}"] = fast.report.to_dict()
        calls[f"slimnets {zeros:.0%}"] = lambda fast=fast: fast(x)  # type: ignore[misc]
        if zeros >= 0.8:
            product = with_csr(pruned(name, zeros), x)
            calls[f"torch CSR {zeros:.0%}"] = lambda product=product: product(x)  # type: ignore[misc]
    return calls, reports


def in_turn(calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every call, round by round."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            start = perf_counter()
            call()
            times[name].append((perf_counter() - start) * 1e3)
    return times


def summary(times: list[float]) -> dict[str, float]:
    """Median, spread and minimum."""
    low, _, high = statistics.quantiles(times, n=4)
    spread = (high - low) / 2
    return {"median": statistics.median(times), "spread": spread, "min": min(times)}


def table(results: list[dict[str, Any]]) -> Table:
    """Rows are runtimes, columns batch and threads."""
    columns = sorted({(r["threads"], r["batch"]) for r in results})
    shown = Table(title="times as fast as dense eager PyTorch (ms, half the quartile distance)")
    shown.add_column("")
    for threads, batch in columns:
        shown.add_column(f"batch {batch}, {threads} thread{'s' * (threads > 1)}", justify="right")
    for name in dict.fromkeys(r["name"] for r in results):
        cells = []
        for column in columns:
            found = [
                r for r in results if r["name"] == name and (r["threads"], r["batch"]) == column
            ]
            text = "{ratio:.1f}x ({median:.2f} ± {spread:.2f})".format(**found[0]) if found else ""
            cells.append(text)
        shown.add_row(name, *cells)
    return shown


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Speed-up against sparsity, one panel for each number of threads."""
    from matplotlib.figure import Figure

    threads = sorted({r["threads"] for r in results})
    figure = Figure(figsize=(5 * len(threads), 4), layout="constrained")
    for axes, count in zip(
        figure.subplots(1, len(threads), squeeze=False)[0], threads, strict=True
    ):
        for batch in sorted({r["batch"] for r in results}):
            rows = [r for r in results if (r["threads"], r["batch"]) == (count, batch)]
            ours = [r for r in rows if r["name"].startswith("slimnets")]
            zeros = [float(r["name"].split()[1].rstrip("%")) for r in ours]
            (line,) = axes.plot(zeros, [r["ratio"] for r in ours], "o-", label=f"batch {batch}")
            best = max(
                r["ratio"] for r in rows if not r["name"].startswith(("slimnets", "torch CSR"))
            )
            axes.axhline(best, color=line.get_color(), linestyle=":")
        axes.set(xlabel="zeros, %", ylabel="times as fast as dense eager", yscale="log")
        axes.set_title(f"{count} thread{'s' * (count > 1)} (dotted: the best dense runtime)")
        axes.legend()
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write JSON and a plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=NETWORKS, default="vgg19")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--zeros", type=float, nargs="+", default=[0, 0.5, 0.8, 0.9, 0.95, 0.98])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--quick", action="store_true", help="a tiny network, few rounds")
    parser.add_argument("--out", type=Path, help="folder for speed-NETWORK.json, .md and .png")
    options = parser.parse_args(arguments)
    if options.quick:
        options.network, options.batches, options.threads = "tiny", [2], [1]
        options.zeros, options.rounds, options.no_compile = [0.0, 0.9], 4, True
    print(json.dumps(machine(*PACKAGES), indent=2))
    results, reports = [], {}
    for threads in options.threads:
        torch.set_num_threads(threads)
        for batch in options.batches:
            x = torch.randn(batch, *NETWORKS[options.network][1])
            with torch.inference_mode():
                calls, report = contestants(
                    options.network, x, threads, options.zeros, not options.no_compile
                )
                times = {n: summary(t) for n, t in in_turn(calls, options.rounds).items()}
            reports[f"batch {batch}, threads {threads}"] = report
            for name, values in times.items():
                ratio = times[EAGER]["median"] / values["median"]
                row = {"name": name, "batch": batch, "threads": threads, "ratio": ratio, **values}
                results.append(row)
    shown = table(results)
    show(shown)
    if options.out:
        figures = {"machine": machine(*PACKAGES), "network": options.network}
        figures |= {"results": results, "reports": reports}
        keep(options.out, f"speed-{options.network}", figures, shown)
        plot(results, options.out / f"speed-{options.network}.png")


if __name__ == "__main__":
    main()
