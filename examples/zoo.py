"""Prune, factorize, save, load and merge networks of other libraries, and print what became.

Weights are random and images small; nothing is downloaded. Needs ``timm``.

    python examples/zoo.py                               every network, some minutes
    python examples/zoo.py "resnet*" LSTM                those that a glob matches
    python examples/zoo.py --markdown docs/networks.md   writes the tables as a page
    python examples/zoo.py --accelerate "*_050"          slimnets.accelerate too, which takes long
"""

import argparse
import logging
import warnings
from collections import Counter
from fnmatch import fnmatchcase
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table
from zoo_check import RANK, SPARSITY, TOLERANCE, Outcome, check
from zoo_networks import networks

COLUMNS = (
    *("network", "layers", "pruned", "factorized", "left dense, and why", "not pruned, and why"),
    *("weights", "zeros", "bytes, dense", "bytes, file", "result"),
)
NUMERIC = {1, 2, 3, 6, 7, 8, 9}

PAGE = """# Networks of other libraries, and small ones

```bash
{command}
```

{totals}

Each network gets random weights, none of them constant, and its batch norms the statistics of some
inputs, or its signals would fade away in depth. `factorize(model, {rank})`,
`prune(model, {sparsity})`, `save`, and `load` into a network of other random weights; **holds**
says:

- every weight that is pruned has exactly `round({sparsity} * n)` zeros, all of them +0.0;
- the loaded state dict equals the saved one bit for bit, and so do the outputs, on two samples;
- `merge` gives the layers of the dense network back, and outputs that differ from those of the
  pairs by less than {tolerance} of what the two samples differ by, in float64 (of detectors: the
  outputs of backbone and heads, before boxes are chosen).

A sentence in its place is the error that names what the network lacks. Layers are those that a
user may have in mind: linear, convolutional, recurrent, attention. "Not pruned" counts parameters
of two and more dimensions. Bytes of the dense network are those that `torch.save` takes for its
state dict.

timm's `ScaledStdConv2d` and `StdConv2d` (in the NF-ResNets and ResNetV2) standardize their weight
in every forward pass: their parameter has the zeros and the small file, but what they multiply by
has none. Leave them out with `exclude=`.
"""


def cells(name: str, outcome: Outcome) -> list[str]:
    """One row of the table."""
    reasons = (outcome.dense, outcome.unpruned)
    left, unpruned = (
        "; ".join(f"{count}: {reason}" for reason, count in one.most_common()) for one in reasons
    )
    numbers = (outcome.weights, outcome.zeros, outcome.bytes_dense, outcome.bytes_file)
    result = outcome.wrong or outcome.refused or "holds"
    if outcome.choice and not outcome.wrong:
        result += f"; accelerate: {outcome.choice}"
    counts = (outcome.layers, outcome.pruned, outcome.factorized)
    return [name, *map(str, counts), left, unpruned, *(f"{n:,}" for n in numbers), result]


def totals(outcomes: dict[str, Outcome]) -> str:
    """What became of all of them, in a few sentences."""
    found = [*outcomes.values()]
    families = Counter(one.family for one in found)
    listed = ", ".join(f"{count} {family}" for family, count in families.items())
    layers, pruned, factorized = (
        sum(getattr(one, field) for one in found) for field in ("layers", "pruned", "factorized")
    )
    dense: Counter[str] = sum((one.dense for one in found), Counter())
    reasons = "; ".join(f"{count:,}: {reason}" for reason, count in dense.most_common())
    return (
        f"{len(found)} networks ({listed}) with {layers:,} layers: {pruned:,} pruned, "
        f"{factorized:,} factorized, {sum(dense.values()):,} left dense ({reasons}). "
        f"{sum(bool(one.refused) for one in found)} refused by name, "
        f"{sum(bool(one.wrong) for one in found)} went wrong."
    )


def page(outcomes: dict[str, Outcome]) -> str:
    """All tables as Markdown."""
    command = 'pip install -e ".[dev]"\npython examples/zoo.py --markdown docs/networks.md'
    text = PAGE.format(
        command=command,
        totals=totals(outcomes),
        rank=RANK,
        sparsity=SPARSITY,
        tolerance=f"{TOLERANCE:g}",
    )
    rule = "|".join("---:" if i in NUMERIC else "---" for i in range(len(COLUMNS)))
    for family, rows in groupby(outcomes.items(), lambda item: item[1].family):
        lines = [f"| {' | '.join(cells(*row))} |" for row in rows]
        text += "\n".join(
            ["", f"## {family}", "", f"| {' | '.join(COLUMNS)} |", f"|{rule}|", *lines]
        )
        text += "\n"
    return text


def main() -> None:
    """Check the networks that are asked for, and print what became of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=["*"], help="globs over names of networks")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file too")
    parser.add_argument("--accelerate", action="store_true", help="slimnets.accelerate too")
    arguments = parser.parse_args()
    known = networks()
    for glob in arguments.names:
        if not any(fnmatchcase(name, glob) for name in known):
            parser.error(f"{glob!r} matches no network; there are {', '.join(map(repr, known))}")
    chosen = {
        name: network
        for name, network in known.items()
        if any(fnmatchcase(name, glob) for glob in arguments.names)
    }
    logging.getLogger("slimnets").setLevel(logging.ERROR)  # what is left dense is in the table
    warnings.simplefilter("ignore")  # the networks' own
    outcomes: dict[str, Outcome] = {}
    for name, network in track(chosen.items(), "networks", transient=True):
        try:
            outcomes[name] = check(network, accelerate=arguments.accelerate)
        except Exception as error:
            outcomes[name] = Outcome(network.family, failed=f"{type(error).__name__}: {error}")
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 200
    for family, rows in groupby(outcomes.items(), lambda item: item[1].family):
        table = Table(title=family, show_lines=True)
        for number, column in enumerate(COLUMNS):
            table.add_column(column, justify="right" if number in NUMERIC else "left")
        for row in rows:
            table.add_row(*cells(*row))
        console.print(table)
    console.print(totals(outcomes))
    if arguments.markdown:
        arguments.markdown.write_text(page(outcomes))
    if any(one.wrong for one in outcomes.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
