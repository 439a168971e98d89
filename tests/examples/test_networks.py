"""The paper's networks have the paper's weights."""

import pytest
import torch

from examples.networks import NETWORKS, VGG

# as the paper counts them, rounded as it rounds
WEIGHTS = {
    "vgg19": (20.6e6, 0.05e6),
    "vgg19-plain": (20.6e6, 0.05e6),
    "snn-1k": (415e3, 2e3),
    "snn-10k": (4e6, 0.2e6),
    "cnn-1k": (490e3, 2e3),
    "cnn-10k": (4.9e6, 0.05e6),
    "alexnet": (2.5e6, 0.05e6),
    "nin": (967e3, 0.5e3),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_of_the_paper(name: str) -> None:
    expected, rounding = WEIGHTS[name]
    weights = sum(parameter.numel() for parameter in NETWORKS[name]().parameters())
    assert weights == pytest.approx(expected, abs=rounding)


@pytest.mark.parametrize("name", NETWORKS)
def test_logits_of_small_images(name: str) -> None:
    network = NETWORKS[name]().eval()
    with torch.inference_mode():
        logits = network(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 10)
    # the signal neither dies out nor explodes on its way
    assert 1e-3 < logits.std() < 1e3


def test_layers_of_vgg_stand_where_published_weights_have_them() -> None:
    keys = VGG(19).state_dict().keys()
    convolutions = [0, 3, 7, 10, 14, 17, 20, 23, 27, 30, 33, 36, 40, 43, 46, 49]
    assert {f"features.{index}.weight" for index in convolutions} <= keys
    assert {f"features.{index + 1}.running_mean" for index in convolutions} <= keys
    linear = {key for key in keys if key.startswith("classifier")}
    assert linear == {f"classifier.{i}.{kind}" for i in (1, 4, 6) for kind in ("weight", "bias")}
