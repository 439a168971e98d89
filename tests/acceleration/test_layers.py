"""Each type of layer, accelerated alone: odd inputs afterwards."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

from slimnets.acceleration.torch_layers import following_relu
from slimnets.acceleration.trace import trace
from tests.acceleration.networks import computed_by

LAYERS = {
    "linear": (lambda: nn.Linear(12, 9), (12,)),
    "linear on sequences": (lambda: nn.Linear(12, 9), (5, 12)),
    "linear of no outputs": (lambda: nn.Linear(12, 0), (12,)),
    "convolution": (lambda: nn.Conv2d(12, 9, 3), (12, 8, 9)),
    "1 x 1": (lambda: nn.Conv2d(12, 9, 1), (12, 8, 9)),
    "strided and dilated": (lambda: nn.Conv2d(12, 9, 3, 2, 2, 2), (12, 8, 9)),
    "grouped": (lambda: nn.Conv2d(12, 9, 3, groups=3), (12, 8, 9)),
    "depthwise": (lambda: nn.Conv2d(12, 24, 3, padding=1, groups=12), (12, 8, 9)),
    "reflecting": (lambda: nn.Conv2d(12, 9, 3, padding=1, padding_mode="reflect"), (12, 8, 9)),
    "1-d": (lambda: nn.Conv1d(12, 9, 3, padding=1), (12, 8)),
    "1-d depthwise": (lambda: nn.Conv1d(12, 12, 3, stride=2, groups=12), (12, 8)),
    "transposed": (lambda: nn.ConvTranspose2d(12, 9, 3, stride=2), (12, 8, 9)),
    "attention": (lambda: nn.TransformerEncoderLayer(12, 3, 20, batch_first=True), (5, 12)),
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op")
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("density", [1.0, 0.2, 0.0])
@pytest.mark.parametrize("variant", ["engine", "dense"])
def test_odd_inputs_after_acceleration(name, density, variant):
    if name == "transposed" and variant == "engine":
        pytest.skip("the engine has none")
    make, shape = LAYERS[name]
    network = nn.Sequential(make(), nn.ReLU6(), nn.Flatten(1)).eval().requires_grad_(False)
    for parameter in network.parameters():
        if parameter.dim() > 1:
            parameter.mul_(torch.rand_like(parameter) < density)
    fast = computed_by(variant, network, torch.randn(2, *shape)).fast
    strided = torch.randn(3, *(2 * n for n in shape))[
        (slice(None), *[slice(None, None, 2)] * len(shape))
    ]
    for x in (
        strided,
        torch.randn(3, *reversed(shape)).permute(0, *range(len(shape), 0, -1)),
        torch.randn(1, *shape).expand(4, *shape),
        torch.randn(0, *shape),
    ):
        torch.testing.assert_close(fast(x), network(x), rtol=1e-4, atol=1e-4)
    if density == 1.0:  # no weight is skipped
        for value in (torch.nan, torch.inf, -torch.inf):
            x = torch.randn(3, *shape)
            x[1].view(-1)[7] = value
            torch.testing.assert_close(fast(x), network(x), rtol=1e-4, atol=1e-4, equal_nan=True)


def test_a_layer_that_is_called_relu_need_not_be_one():
    layers = {"conv": nn.Conv2d(3, 4, 3), "relu": nn.LeakyReLU()}
    graph = trace(nn.Sequential(OrderedDict(layers)), 1)
    assert graph is not None
    (conv,) = (node for node in graph.graph.nodes if node.target == "conv")
    assert following_relu(conv) is None
