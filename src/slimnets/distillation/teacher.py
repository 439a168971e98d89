"""The teacher: a frozen network that stands beside the module tree, not in it."""

import hashlib
from collections.abc import Collection
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from slimnets.layers import plain_name


class Teacher:
    """A frozen network that no module tree knows.

    What is not a submodule is in no state dict, ``parameters()``, optimizer or gradient bucket, and
    no ``train()`` reaches it. Copies of the module that holds it share it.

    Args:
        network: The network: put into eval mode, and its parameters no longer require gradients.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self._rest()
        for parameter in network.parameters():  # a ScriptModule refuses requires_grad_
            parameter.requires_grad_(False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The network's output, without a graph, for a copy of the inputs in its own precision."""
        if self.network.training:
            self._rest()
        dtype = next((p.dtype for p in self.network.parameters() if p.is_floating_point()), None)

        def own(tensor: Tensor) -> Tensor:
            # a copy, for either network may work in place on what it is given
            return tensor.detach().to(dtype if tensor.is_floating_point() else None, copy=True)

        with torch.no_grad():
            args, kwargs = apply_to_collection((args, kwargs), Tensor, own, allow_frozen=True)
            return self.network(*args, **kwargs)

    def _rest(self) -> None:
        with suppress(NotImplementedError):  # a program of torch.export is as it was exported
            self.network.eval()

    def to(self, device: torch.device) -> None:
        """Move the network; its precision stays, for a lower one would not come back."""
        tensor = next(chain(self.network.parameters(), self.network.buffers()), None)
        if tensor is not None and tensor.device != device and device.type != "meta":
            # weights that are made in inference mode, as in validation, stay unfit for training
            with torch.inference_mode(False):
                self.network.to(device)

    def fingerprint(self) -> str:
        """A hash of the names, shapes and a sample of the values of the weights."""
        digest = hashlib.sha256()
        for name, tensor in self.network.state_dict().items():
            if isinstance(tensor, Tensor):
                flat = tensor.detach().flatten()
                sample = flat[:: max(1, len(flat) // 1024)].contiguous().cpu()
                digest.update(f"{plain_name(name)} {tuple(tensor.shape)}".encode())
                digest.update(sample.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Teacher":
        return self


def load_weights(network: nn.Module, path: str | Path) -> None:
    """Fill ``network`` from a file of its state dict, whichever of the two is of a compiled one.

    Args:
        network: The network, as its author builds it.
        path: A ``.safetensors`` file, or one of ``torch.save`` with a state dict or a checkpoint of
            Lightning in it; of a module with all its weights in one network, as a
            DistillationModule in its student, that network's. What is pickled beside tensors and
            plain values is refused.

    Raises:
        ValueError: If the file is damaged or refused, or names or shapes are not those of
            ``network``, which is left as it was.
        OSError: If there is no such file.
    """
    filled = network.state_dict()
    own = {plain_name(name): name for name in filled}
    state = {plain_name(name): value for name, value in _state_in(path).items()}
    state = _of_network_within(state, own)
    wrong = sorted(
        name
        for name in own.keys() | state.keys()
        if name not in own or name not in state or _shape(filled[own[name]]) != _shape(state[name])
    )
    if wrong:
        hint = ""
        if Path(path).suffix == ".safetensors" and _is_artifact(path):
            hint = "; it was written by slimnets.save: fill the teacher by slimnets.load instead"
        raise ValueError(
            f"teacher_weights={str(path)!r} are not of this {type(network).__name__}: {len(wrong)} "
            f"of {len(own.keys() | state.keys())} names or shapes differ, {wrong[0]!r} the first"
            f"{hint}"
        )
    # in place, for the versions of the modules' own formats, which come with the state dict
    filled.update({own[name]: value for name, value in state.items()})
    network.load_state_dict(filled)


def _of_network_within(state: dict[str, Any], own: Collection[str]) -> dict[str, Any]:
    """``state`` without the names of the modules around all of it that ``own`` does not have."""
    while len(outer := {name.partition(".")[0] for name in state}) == 1:
        prefix = f"{outer.pop()}."
        if not all(name.startswith(prefix) for name in state):  # that is a tensor
            break
        if any(name.startswith(prefix) for name in own):
            break
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def _state_in(path: str | Path) -> dict[str, Any]:
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # of a damaged file, torch and pickle raise a dozen kinds
        raise ValueError(
            f"teacher_weights={str(path)!r} cannot be read: expected whole safetensors, or a state "
            "dict of torch.save or checkpoint of Lightning with nothing but tensors and plain "
            "values; load any other file yourself, if you trust it, and pass the network as "
            "teacher="
        ) from error
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else {}
    is_state = isinstance(state, dict) and all(isinstance(name, str) for name in state)
    return state if is_state else {}


def _is_artifact(path: str | Path) -> bool:
    with safe_open(path, "pt") as file:
        return "slimnets" in (file.metadata() or {})


def _shape(value: Any) -> Any:
    return getattr(value, "shape", None)
