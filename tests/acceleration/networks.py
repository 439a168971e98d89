"""Networks to accelerate, and how alike results are."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slimnets.acceleration import convert, opaque
from slimnets.acceleration.convert import accelerate
from slimnets.acceleration.host import NO_ENGINE
from slimnets.acceleration.module import Accelerated

TOLERANCE = 1e-4


def prune(network: nn.Module, sparsity: float) -> nn.Module:
    """Random zeros, with statistics and gains so that every layer is felt in the output."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            with torch.no_grad():
                fan = layer.weight[0].numel()
                nn.init.normal_(layer.weight, 0.0, (2.0 / fan / (1.0 - sparsity)) ** 0.5)
                layer.weight.masked_fill_(torch.rand_like(layer.weight) < sparsity, 0.0)
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.running_mean, -0.2, 0.2)
            nn.init.uniform_(layer.running_var, 0.7, 1.5)
    return network.eval()


def vgg() -> nn.Module:
    layers: list[nn.Module] = []
    channels = 3
    for width in (16, 16, 0, 32, 32, 0, 64, 0):
        if width:
            conv = nn.Conv2d(channels, width, 3, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            channels = width
        else:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(), nn.Linear(64 * 16, 10))


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 64, activation="gelu", batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def body(*more: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), *more, nn.Conv2d(32, 16, 3))


def computed_by(variant: str, network: nn.Module, example: Any) -> Accelerated:
    """``network``, accelerated by a variant that is chosen whatever is fastest here.

    "engine" and "dense" are of a network that is traced, "layers" of one that is not. What computes
    is in ``fast``; a call of the whole would hide an error of it behind the network itself.
    """
    if NO_ENGINE and variant == "engine":
        pytest.skip(NO_ENGINE)

    def preferred(times: dict[str, float], least_gain: float) -> str:
        return next(one for one in (variant, "engine", "dense", *times) if one in times)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert, "fastest", preferred)
        patch.setattr(opaque, "fastest", preferred)
        found = accelerate(network, example)
    assert found.fast is not None, found.report.note
    assert variant in found.report.tried, found.report.tried
    assert "stays as it is:" not in found.report.note
    return found


def assert_right(network: nn.Module, found: Accelerated, *inputs: Tensor) -> None:
    assert found.fast is not None
    with torch.no_grad():
        for x in inputs:
            expected = network(x.clone())
            scale = float(expected.abs().max())
            result = found.fast(x.clone())
            torch.testing.assert_close(result, expected, rtol=0, atol=TOLERANCE * scale)
