"""A checkpoint of Lightning to one small file, without a Trainer."""

import os
from collections.abc import Mapping
from typing import Any
from zipfile import is_zipfile

import torch

from slimnets.artifact.container import naming, pack
from slimnets.artifact.streams import ArtifactError
from slimnets.files import PathLike, write
from slimnets.layers import plain_name


def convert_checkpoint(
    checkpoint: PathLike | Mapping[str, Any],
    path: PathLike,
    *,
    dtype: torch.dtype | None = None,
    bits: int = 8,
    network: str | None = None,
) -> None:
    """Write the weights in a checkpoint of Lightning as :func:`slimnets.save` writes a network's.

    A checkpoint written under ``WeightAveraging`` holds the averages, so the file does too.

    Args:
        checkpoint: A ``.ckpt`` file, read without executing anything in it. If it holds objects
            that this refuses and you trust it, pass ``torch.load(path, weights_only=False)``.
        path: Where to.
        dtype: As for :func:`slimnets.save`; int8 scales run along each weight's first dimension,
            as a checkpoint does not say which layers are transposed. Nor does it say what is a
            buffer: those with "weight" in their names are rounded too, but for masks.
        bits: As for :func:`slimnets.save`.
        network: The submodule whose weights to take, ``""`` for all. By default the student of a
            DistillationModule, and all of any other module.

    Raises:
        ArtifactError: If ``checkpoint`` is not a whole checkpoint.
        ValueError: If there is no such submodule, or ``dtype`` or ``bits`` is unknown.
        TypeError: If the state dict holds what is no plain tensor.
        OSError: If a file cannot be read or written.
    """
    if not isinstance(checkpoint, Mapping):
        with naming(checkpoint):
            checkpoint = _loaded(checkpoint)
    state = checkpoint.get("state_dict")
    if not (isinstance(state, Mapping) and state and all(isinstance(one, str) for one in state)):
        raise ArtifactError(
            "not a checkpoint of Lightning: it has no 'state_dict' of names and tensors; of a "
            "state dict alone, pass {'state_dict': state}"
        )
    if network is None:
        network = "student" if "distillation" in checkpoint else ""
    prefix = f"{network}." if network else ""
    plain = {plain_name(name): value for name, value in state.items()}
    chosen = {
        name.removeprefix(prefix): value for name, value in plain.items() if name.startswith(prefix)
    }
    if not chosen:
        places = ", ".join(sorted({name.partition(".")[0] for name in plain}))
        raise ValueError(f"network={network!r}: the checkpoint has only {places}")
    masks = [name for name in chosen if name.endswith("_mask")]  # as of torch.nn.utils.prune
    write(path, pack(chosen, dtype, bits, buffers=masks))


def _loaded(path: PathLike) -> Mapping[str, Any]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # of a damaged file, torch and pickle raise a dozen kinds
        refused = [line.strip() for line in str(error).splitlines() if "Unsupported" in line]
        # of what is no pickle at all, the first bytes are unsupported operands
        if refused and ("operand" not in refused[0] or is_zipfile(path)):
            raise ArtifactError(
                "cannot be read as a checkpoint without executing what is in it; if you trust it, "
                f"pass torch.load({os.fspath(path)!r}, map_location='cpu', weights_only=False) in "
                f"the place of its name ({refused[0]})"
            ) from error
        raise ArtifactError(f"cannot be read as a checkpoint: {error}") from error
    if not isinstance(loaded, Mapping):
        raise ArtifactError(f"not a checkpoint of Lightning, but a {type(loaded).__name__}")
    return loaded
