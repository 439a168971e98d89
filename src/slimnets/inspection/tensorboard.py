"""What only TensorBoard can show: pictures of masks, histograms of weights, the summary as text.

Every function skips the loggers that are not TensorBoard's, writes on rank zero only, and turns
an error into a warning: a picture is no reason to lose a training run.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import TYPE_CHECKING, Concatenate, ParamSpec

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn import functional as F

from slimnets.layers import compressed_network
from slimnets.trainer import logged_step

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

P = ParamSpec("P")

PIXELS = 512  # the longer side of a picture; TensorBoard shows no more in a column
PRUNED, WHITE = 224, 255  # so that a mask's edges stand out from the page


def _never_fails(
    write: Callable[Concatenate[L.Trainer, P], None],
) -> Callable[Concatenate[L.Trainer, P], None]:
    @wraps(write)
    def guarded(trainer: L.Trainer, /, *args: P.args, **kwargs: P.kwargs) -> None:
        if not trainer.is_global_zero or not trainer.loggers:
            return
        try:
            write(trainer, *args, **kwargs)
        except Exception as error:
            rank_zero_warn(f"{write.__name__} wrote nothing: {type(error).__name__}: {error}")

    return guarded


@_never_fails
def log_masks(trainer: L.Trainer, masks: Mapping[str, Tensor]) -> None:
    """Draw each mask as an image ``mask/NAME``, one row of pixels per output channel.

    Args:
        trainer: The trainer whose TensorBoard loggers are written to.
        masks: Parameter name to bool tensor in the parameter's shape, True where a weight is kept.
    """
    for writer in _writers(trainer):
        for name, mask in masks.items():
            writer.add_image(f"mask/{name}", mask_image(mask), logged_step(trainer))


@_never_fails
def log_weights(trainer: L.Trainer, network: nn.Module, names: Iterable[str]) -> None:
    """Draw a histogram ``weights/NAME`` of the non-zero weights of each name.

    Args:
        trainer: The trainer whose TensorBoard loggers are written to.
        network: The compressed network.
        names: Names of parameters in it.
    """
    names = list(names)
    for writer in _writers(trainer):
        for name in names:
            weights = network.get_parameter(name).detach().float()
            surviving = weights[weights.isfinite() & (weights != 0)]
            if surviving.numel():
                writer.add_histogram(f"weights/{name}", surviving, logged_step(trainer))


@_never_fails
def log_summary(trainer: L.Trainer) -> None:
    """Write the summary of the network as a table under Text, and its totals to every logger.

    If the network or the module around it has an ``example_input_array``, operations and latency
    are measured, in the precision that the weights have. Where its forward pass fails, they stay
    unknown.

    Args:
        trainer: The trainer whose loggers are written to; only TensorBoard's get the table.
    """
    # imported late: the callbacks import this file, and the summary the layers beside them
    from slimnets.inspection.summary import count, example_of, summarize

    module, precision = trainer.lightning_module, trainer.precision_plugin
    example = precision.convert_input(example_of(module))
    try:
        # as it is saved, not as it trains: without autocast
        with precision.forward_context(), torch.autocast(module.device.type, enabled=False):
            summary = summarize(module, example)
    except Exception as error:
        if example is None:
            raise
        rank_zero_warn(
            "log_summary wrote no operations and no latency: the forward pass of "
            f"example_input_array failed: {type(error).__name__}: {error}"
        )
        summary = count(compressed_network(module))
    for writer in _writers(trainer):
        writer.add_text("summary", summary.to_markdown(), logged_step(trainer))
    totals = {f"summary/{name}": value for name, value in summary.totals.items()}
    for logger in trainer.loggers:
        logger.log_metrics(totals, step=logged_step(trainer))


def mask_image(mask: Tensor) -> Tensor:
    """A mask as a picture: kept weights are black, pruned ones grey.

    A kernel (out, in, ...) is flattened to (out, in·k·k). A picture with more weights than pixels
    shows in each pixel the share of weights that is kept; a small one is enlarged.

    Args:
        mask: Bool tensor, True where a weight is kept.

    Returns:
        (1, height, width) uint8, neither side over 512 pixels, and no higher than wide.
    """
    rows = len(mask) if mask.dim() > 1 else 1
    kept = mask.detach().reshape(1, 1, rows, -1).float()
    height, width = kept.shape[2:]
    shrunk = (min(height, PIXELS), min(width, PIXELS))
    kept = F.adaptive_avg_pool2d(kept, shrunk)
    across = max(1, PIXELS // max(shrunk))
    down = max(across, PIXELS // 4 // shrunk[0])  # a flat one would be a line
    kept = kept[0].repeat_interleave(down, 1).repeat_interleave(across, 2)
    # the root spreads the low densities of a heavily pruned layer over the visible greys
    picture = PRUNED * (1 - kept.sqrt())
    # TensorBoard gives every picture the same width, and a narrow one would fill the page
    margin = max(0, picture.shape[1] - picture.shape[2])
    return F.pad(picture, [0, margin], value=WHITE).round().to(torch.uint8).cpu()


def _writers(trainer: L.Trainer) -> "list[SummaryWriter]":
    return [one.experiment for one in trainer.loggers if isinstance(one, TensorBoardLogger)]
