"""The forms in which a user may store a pruned network, for ``file_size.py``."""

import copy
import gzip
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

import slimnets

try:
    from compression import zstd  # Python 3.14
except ImportError:
    try:
        import zstandard as zstd
    except ImportError:
        zstd = None

State = Mapping[str, Tensor]


@dataclass
class Form:
    """One way to store a network: how to write it, and how to fill a network from it again."""

    name: str
    save: Callable[[nn.Module, Path], object]
    load: Callable[[Path, nn.Module], object]
    prepare: Callable[[nn.Module], nn.Module] = lambda network: network
    dtype: torch.dtype = torch.float32


def plain(state_to_file: Callable[[State], State] = dict) -> Callable[[nn.Module, Path], object]:
    """``torch.save`` of what a function makes of the state dict."""
    return lambda network, path: torch.save(state_to_file(network.state_dict()), path)


def weights(transform: Callable[[Tensor], Tensor]) -> Callable[[State], State]:
    """Apply a function to every weight, and leave vectors alone."""
    return lambda state: {k: transform(v) if v.dim() > 1 else v for k, v in state.items()}


def load_plain(path: Path, network: nn.Module) -> None:
    """Fill ``network`` from a state dict of dense, COO or CSR tensors."""
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    state = torch.load(path, weights_only=True)
    dense = {k: v if v.layout is torch.strided else v.to_dense() for k, v in state.items()}
    network.load_state_dict({k: v.reshape(shapes[k]) for k, v in dense.items()})


def squeezed(compress: Callable[[bytes], bytes]) -> Callable[[nn.Module, Path], object]:
    """``torch.save``, then a general compressor."""

    def save(network: nn.Module, path: Path) -> None:
        buffer = io.BytesIO()
        torch.save(network.state_dict(), buffer)
        path.write_bytes(compress(buffer.getvalue()))

    return save


def load_squeezed(decompress: Callable[[bytes], bytes]) -> Callable[[Path, nn.Module], object]:
    """Undo :func:`squeezed`."""

    def load(path: Path, network: nn.Module) -> None:
        state = torch.load(io.BytesIO(decompress(path.read_bytes())), weights_only=True)
        network.load_state_dict(state)

    return load


def save_bitmask(network: nn.Module, path: Path) -> None:
    """One bit a value and the values that are not zero, in a safetensors file."""
    parts = {}
    for name, tensor in network.state_dict().items():
        mask = tensor != 0
        parts[f"{name}.mask"] = torch.from_numpy(np.packbits(mask.numpy()))
        parts[f"{name}.values"] = tensor[mask]
    safetensors.torch.save_file(parts, path)


def load_bitmask(path: Path, network: nn.Module) -> None:
    """Undo :func:`save_bitmask`."""
    parts = safetensors.torch.load_file(path)
    state = {}
    for name, tensor in network.state_dict().items():
        mask = np.unpackbits(parts[f"{name}.mask"].numpy(), count=tensor.numel())
        state[name] = torch.zeros_like(tensor)
        state[name].view(-1)[torch.from_numpy(mask).bool()] = parts[f"{name}.values"]
    network.load_state_dict(state)


def reparametrized(network: nn.Module) -> nn.Module:
    """A copy pruned as ``torch.nn.utils.prune`` does it, with masks and originals."""
    network = copy.deepcopy(network)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            torch_prune.custom_from_mask(layer, "weight", layer.weight != 0)
    return network


def ours(dtype: torch.dtype | None = None) -> Form:
    """What this library writes."""
    name = "slimnets.save" + (f", {str(dtype).removeprefix('torch.')}" if dtype else "")
    return Form(
        name,
        lambda network, path: slimnets.save(network, path, dtype=dtype),
        slimnets.load,
        dtype=dtype or torch.float32,
    )


def forms() -> list[Form]:
    """The forms to compare, the dense one first."""
    found = [
        Form("torch.save", plain(), load_plain),
        Form("torch.nn.utils.prune", plain(), load_plain, reparametrized),
        Form("COO", plain(weights(Tensor.to_sparse)), load_plain),
        Form("CSR", plain(weights(lambda w: w.flatten(1).to_sparse_csr())), load_plain),
        Form("gzip", squeezed(lambda b: gzip.compress(b, 6)), load_squeezed(gzip.decompress)),
    ]
    if zstd:
        found.append(Form("zstd", squeezed(zstd.compress), load_squeezed(zstd.decompress)))
    found.append(Form("bitmask and values", save_bitmask, load_bitmask))
    return [*found, ours(), ours(torch.float16), ours(torch.bfloat16), ours(torch.int8)]
