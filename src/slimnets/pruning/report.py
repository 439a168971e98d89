"""What GradualPrune says and logs."""

from collections.abc import Mapping, Sequence

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from slimnets.arguments import changed
from slimnets.pruning.pruner import Pruner, warn_of_empty
from slimnets.pruning.span import Span
from slimnets.pruning.weights import Sparsity, left_unasked
from slimnets.selectors import Selector


def scalars(
    pruners: Sequence[Pruner], due: Mapping[Pruner, Mapping[str, float]]
) -> dict[str, float]:
    """The sparsity that is due over the weights of all, and what each of ``pruners`` has.

    Args:
        pruners: Those whose weights' sparsities and thresholds are asked for.
        due: All of them, and the shares of zeros that their weights should have by now.
    """
    zeros = sum(
        share * one.parameters[name].numel()
        for one, shares in due.items()
        for name, share in shares.items()
    )
    figures = {"sparsity/target": zeros / sum(one.total for one in due)}
    for pruner in pruners:
        sizes = {name: weights.numel() for name, weights in pruner.parameters.items()}
        figures |= {f"sparsity/{name}": n / sizes[name] for name, n in pruner.counts.items()}
        figures |= {f"threshold/{name}": value for name, value in pruner.thresholds.items()}
    return figures


def overall(pruners: Sequence[Pruner]) -> Tensor:
    """The share of zeros among the weights of all ``pruners``, on the CPU.

    Of a number, ``log`` makes a tensor on the device of the module, which waits for that device.
    """
    zeros = sum(sum(pruner.counts.values()) for pruner in pruners)
    return torch.tensor(zeros / sum(pruner.total for pruner in pruners))


def warn_at_start(
    network: nn.Module, pruner: Pruner, sparsity: Sparsity, exclude: Sequence[Selector]
) -> None:
    """Name what is left alone unasked, what begins too sparse, and what will be empty."""
    for what in left_unasked(network, sparsity, exclude):
        rank_zero_warn(f"GradualPrune leaves {what}")
    if overfull := pruner.overfull():
        shares = ", ".join(f"{name!r} with {share:.1%}" for name, share in overfull.items())
        rank_zero_warn(
            f"GradualPrune(sparsity={sparsity!r}): layers begin with more zeros than asked, which "
            f"are kept: {shares}; where these are an initialisation and no pruned weights, exclude "
            "the layer or initialise it otherwise"
        )
    warn_of_empty(pruner.emptied())


def warn_if_too_short(span: Span, length: float) -> None:
    """Say so if a resumed run, ``length`` steps with those before, does not reach its span's end.

    It is not refused, as a new one is, since it may be resumed once more.
    """
    if span.end > length:
        rank_zero_warn(
            f"GradualPrune: pruning ends at step {span.end}, as resolved when the run began, and "
            f"this run ends after {length:g} optimizer steps, so the target sparsity will not be "
            "reached; train for longer, or give another end="
        )


def warn_at_end(pruner: Pruner, steps: int, span: Span) -> None:
    """Say how far pruning came, if it did not come to its end."""
    if not pruner.reached:
        rank_zero_warn(
            f"GradualPrune: training stopped after {steps} optimizer steps, before pruning ends at "
            f"step {span.end}: the sparsity is {pruner.sparsity:.2%}, not {pruner.target:.2%}"
        )


def warn_of_changes(before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Name the arguments that differ from those of the checkpoint."""
    for name in changed(before, now):
        rank_zero_warn(
            f"GradualPrune({name}={now[name]}): the checkpoint was made with "
            f"{name}={before[name]}; going on with {now[name]}, zeros are kept"
        )


def warn_of_others(state_key: str, others: Sequence[str]) -> None:
    """Say that it is not known which of the checkpoint's GradualPrune callbacks goes on here."""
    rank_zero_warn(
        f"{state_key} begins its schedule anew, zeros are kept: the checkpoint has {len(others)} "
        f"others that are gone, {', '.join(others)}; to go on with the steps of one, leave the "
        "globs and exclude of the rest as they were"
    )
