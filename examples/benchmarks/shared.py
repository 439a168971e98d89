"""What the benchmarks share: the paper's network, and what a figure was measured on."""

import json
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from rich.box import MARKDOWN, SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

sys.path.append(str(Path(__file__).parents[1]))  # the examples' networks
from networks import PAPER_RANKS as PAPER_RANKS
from networks import VGG as VGG


def random_vgg19(width: float = 1.0) -> VGG:
    """VGG-19 with batch norm, 20.6 M weights at ``width`` 1, none of them at its initial value.

    Biases and norms that are all 0 or 1 would flatter whatever compresses them.
    """
    network = VGG(19, width=width)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if tensor.dim() > 1:
                tensor.normal_(0, 0.05)
            elif tensor.dim():
                tensor.normal_(float(not name.endswith("bias")), 0.1).abs_()
    return network


def machine(*packages: str) -> dict[str, str]:
    """Processor, Python, and the versions of slimnets, torch and ``packages``."""
    found = {"python": platform.python_version()}
    for package in ("slimnets", "torch", *packages):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    found["processor"] = models[0] if models else platform.processor()
    found["instructions"] = torch.backends.cpu.get_cpu_capability()
    if torch.cuda.is_initialized():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def show(table: Table) -> None:
    """Print ``table``, wide enough."""
    table.box = SIMPLE_HEAD
    Console(width=max(140, Console().width), highlight=False).print(table)


def markdown(table: Table) -> str:
    """``table`` with its title and caption, as Markdown."""
    table.box, table.title_justify = MARKDOWN, "left"
    for row in table.rows:
        row.end_section = False  # Markdown has no lines between rows
    text = StringIO()
    Console(file=text, width=300).print(table)
    return text.getvalue()


def keep(folder: Path, name: str, figures: dict[str, Any], *tables: Table) -> None:
    """Write the figures as JSON and the tables as Markdown to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(figures, indent=1) + "\n")
    (folder / f"{name}.md").write_text("".join(map(markdown, tables)))
