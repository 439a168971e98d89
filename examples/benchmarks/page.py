"""Make docs/benchmarks.md of the figures in docs/benchmarks.

    python examples/benchmarks/page.py

A section whose figures are missing is left out.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import file_size
import roofline
import speed
import training_cost
from rich.table import Table
from shared import markdown

Figures = dict[str, Any]
DOCS = Path(__file__).parents[2] / "docs" / "benchmarks"

HEAD = """# Benchmarks

Made by `python examples/benchmarks/page.py` of the figures in [{folder}/]({folder}), which the
commands below write (`pip install ".[benchmarks]"`). Times are ratios of what was measured in
turn, in one run, with the kernels as they are. Each section ends with the machine and the versions
that it was measured with.
"""

FILE = """## The file

```bash
python examples/benchmarks/file_size.py --out docs/benchmarks
```

VGG-19 for 32 x 32 images, {weights:,} parameters with random values, pruned by magnitude. *Of the
limit* is relative to `nnz * bits(value) + n * H(sparsity)`, summed over tensors; for int8 the
values count with their empirical entropy. Names, shapes, scales and everything else in the header
count for us and not for the limit. A float's exponent costs less than its eight bits, which that
bound does not know, so exact files come out below it. Times are in those of `torch.save` and
`torch.load`, which took {results[0][save_seconds]:.2f} s and {results[0][load_seconds]:.2f} s at
first: median, and smallest to largest of three. Every float32 form is loaded again and compared
bit for bit.
"""

TRAINING = """## The cost in training

```bash
python examples/benchmarks/training_cost.py --rounds 8 --out docs/benchmarks
```

VGG-19, batch {batch}. Steps are those of Lightning Trainers that take turns step by step.
Lightning's `ModelPruning` prunes by `torch.nn.utils.prune`. Factorizing is checked to have the
error of the full SVD within 1 %. On this machine a step varies by some 20 % from one to the next,
so the ratios of whole steps say no more than that; *masks of GradualPrune* is nearly all that it
adds to a step, timed within that step.
"""

MEMORY = """Peak memory, each in a process of its own at batch 8, beyond that of what it stands
beside:
"""

SPEED = """## Speed: {title}

```bash
python examples/benchmarks/speed.py {options} --out docs/benchmarks
```

{what}.
Zeros are random, the same share in every layer. All rows of one column were measured in turn,
{rounds} turns of at least 20 ms each, of which the median call counts. ONNX Runtime, OpenVINO and
`torch.export` run what `slimnets.export` writes, dense; OpenVINO's default is bfloat16 on
processors that compute it. Columns were measured minutes apart, and the machine's speed drifts:
compare numbers of threads by PyTorch's own row. How `slimnets.accelerate` works:
[faster at run time](acceleration.md).
"""

NETWORKS = {
    "vgg19": (
        "VGG-19",
        "VGG-19 with batch norm for 32 x 32 images; *factorized* is with the paper's ranks, "
        "*factorized, 90 %* with 90 % zeros in the thin layers besides",
    ),
    "resnet18": ("ResNet-18", "torchvision's ResNet-18 at 224 x 224"),
    "transformer": (
        "a Transformer encoder",
        "Two `nn.TransformerEncoderLayer` of width 512 and 2048, 8 heads, sequences of 128",
    ),
    "tcn": (
        "a temporal convolutional network",
        "Five blocks of two causal `nn.Conv1d` (64 channels, kernel 5, dilation 1 to 16) with a "
        "residual sum, sequences of 200",
    ),
    "tiny": ("a narrow VGG-19", "VGG-19 with an eighth of the channels"),
}

ROOFLINE = """## Roofline

```bash
python examples/benchmarks/roofline.py --network {network} --out docs/benchmarks
```

{title}, layer by layer, one thread: the sparse kernel's rate on the non-zeros, two operations for
each of them, pixel and sample. The bound is the lower of the dense peak ({peak_gflops:.0f}
GFLOP/s, a large matrix product in PyTorch) and the bandwidth times operations per byte, where the
bytes are the layer's input and output and 8 for each non-zero. The bandwidth is that of a triad
over as many bytes as one pass over the network touches, so from a cache where they fit; from
memory it is {memory_bandwidth:.0f} GB/s. Above 100 %, the bytes of a layer came from a nearer
cache than those of the whole network would. Layers that are computed otherwise have no figures.
Steps are timed one by one, at their best; the whole network as a user calls it, in the median.
"""


def pipes(table: Table) -> str:
    """The table alone."""
    table.title = table.caption = None
    return "\n".join(line.rstrip() for line in markdown(table).strip().splitlines()) + "\n"


def machine(figures: Figures, threads: str = "") -> str:
    """What it was measured on."""
    on = ", ".join(f"{name} {number}" for name, number in figures["machine"].items())
    return f"{on}; {threads or str(figures.get('threads')) + ' thread(s)'}.\n"


def of_files(figures: Figures, folder: Path) -> list[str]:
    """Bytes in a file."""
    by_sparsity: dict[float, list[Figures]] = {}
    for row in figures["results"]:
        by_sparsity.setdefault(row["sparsity"], []).append(row)
    table = pipes(file_size.table(by_sparsity, "", ""))
    return [FILE.format(**figures), table, machine(figures)]


def of_training(figures: Figures, folder: Path) -> list[str]:
    """Time and memory of training."""
    times, sizes = training_cost.tables(figures)
    return [TRAINING.format(**figures), pipes(times), MEMORY, pipes(sizes), machine(figures)]


def speed_options(figures: Figures) -> str:
    """What the command was given."""
    parts = figures["combinations"]
    given = {
        "network": [figures["network"]],
        "threads": sorted({part["threads"] for part in parts}),
        "batches": sorted({part["batch"] for part in parts}),
        "zeros": [f"{share:g}" for share in figures["zeros"]],
        "rounds": [figures["rounds"]],
    }
    options = [f"--{name} {' '.join(map(str, values))}" for name, values in given.items()]
    return " ".join([*options, *([] if figures["compiled"] else ["--no-compile"])])


def of_speed(figures: Figures, folder: Path) -> list[str]:
    """Against other runtimes."""
    name = figures["network"]
    title, what = NETWORKS[name]
    given = {"options": speed_options(figures), "title": title, "what": what}
    text = SPEED.format(**given, rounds=figures["rounds"])
    plot = f"![speed-up against zeros]({folder.name}/speed-{name}.png)\n"
    parts = [text, plot]
    for table in speed.tables(figures):
        parts += [f"{table.title}:\n", pipes(table)]
    return [*parts, machine(figures, "threads as the tables say")]


def of_layers(figures: Figures, folder: Path) -> list[str]:
    """Against what the processor can do."""
    title = NETWORKS[figures["network"]][0]
    parts = [ROOFLINE.format(title=title, **figures)]
    parts += [f"![GFLOP/s against operations per byte]({folder.name}/roofline.png)\n"]
    for table in roofline.tables(figures):
        parts += [f"{table.title}:\n", pipes(table)]
    return [*parts, machine(figures, "1 thread")]


SECTIONS: dict[str, Callable[[Figures, Path], list[str]]] = {
    "file_size": of_files,
    "training_cost": of_training,
    **{f"speed-{name}": of_speed for name in NETWORKS},
    "roofline": of_layers,
}


def main(arguments: list[str] | None = None) -> None:
    """Write the page beside the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=DOCS)
    folder: Path = parser.parse_args(arguments).folder
    parts = [HEAD.format(folder=folder.name)]
    for name, section in SECTIONS.items():
        path = folder / f"{name}.json"
        if path.exists():
            parts += section(json.loads(path.read_text()), folder)
    folder.with_suffix(".md").write_text("\n".join(parts))


if __name__ == "__main__":
    main()
