"""The networks of the SlimNets paper (arXiv 1808.00496) and a small residual one, for 32 x 32.

All take (batch, 3, 32, 32) and give logits (batch, classes).
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

CONFIGURATIONS = {  # convolutions of each block, a max pooling after every block
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}

PAPER_RANKS = {  # of VGG-19's convolutions, with batch norm
    f"features.{index}": rank
    for index, rank in zip(
        (0, 3, 7, 10, 14, 17, 20, 23, 27, 30, 33, 36, 40, 43, 46, 49),
        (5, 24, 48, 48, 64, 128, 128, 160, 192, 256, 320, 320, 320, 320, 320, 320),
        strict=True,
    )
}


class VGG(nn.Module):
    """VGG (Simonyan & Zisserman, arXiv 1409.1556) with a head of 512, 512 and ``classes`` units.

    Args:
        depth: 11, 13, 16 or 19 layers.
        batch_norm: Whether a batch norm follows every convolution.
        classes: The number of classes.
        width: Channels relative to the original's 64 to 512.
    """

    def __init__(
        self, depth: int = 19, batch_norm: bool = True, classes: int = 10, width: float = 1.0
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for block, repeats in enumerate(CONFIGURATIONS[depth]):
            out = max(1, round(min(64 * 2**block, 512) * width))
            for _ in range(repeats):
                layers.append(nn.Conv2d(channels, out, kernel_size=3, padding=1))
                layers += [nn.BatchNorm2d(out)] if batch_norm else []
                layers.append(nn.ReLU(inplace=True))
                channels = out
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Dropout(),
            nn.Linear(channels, channels),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(channels, channels),
            nn.ReLU(inplace=True),
            nn.Linear(channels, classes),
        )
        he_initialize(self)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, classes) of images (batch, 3, 32, 32)."""
        return self.classifier(self.features(images).flatten(1))


class NIN(nn.Sequential):
    """Network in Network (Lin, Chen & Yan, arXiv 1312.4400)."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__(
            *_convolution(3, 192, kernel_size=5, padding=2),
            *_convolution(192, 160, kernel_size=1),
            *_convolution(160, 96, kernel_size=1),
            nn.MaxPool2d(3, stride=2, padding=1),
            nn.Dropout(),
            *_convolution(96, 192, kernel_size=5, padding=2),
            *_convolution(192, 192, kernel_size=1),
            *_convolution(192, 192, kernel_size=1),
            nn.AvgPool2d(3, stride=2, padding=1),
            nn.Dropout(),
            *_convolution(192, 192, kernel_size=3, padding=1),
            *_convolution(192, 192, kernel_size=1),
            nn.Conv2d(192, classes, kernel_size=1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        he_initialize(self)


class AlexNet(nn.Sequential):
    """AlexNet (Krizhevsky 2012), as the paper cuts it down to small images."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__(
            *_convolution(3, 64, kernel_size=11, stride=4, padding=5),
            nn.MaxPool2d(2),
            *_convolution(64, 192, kernel_size=5, padding=2),
            nn.MaxPool2d(2),
            *_convolution(192, 384, kernel_size=3, padding=1),
            *_convolution(384, 256, kernel_size=3, padding=1),
            *_convolution(256, 256, kernel_size=3, padding=1),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(256, classes),
        )


class SNN(nn.Sequential):
    """Two convolutions of LeNet and one hidden layer of ``hidden`` units."""

    def __init__(self, hidden: int = 1000, classes: int = 10) -> None:
        super().__init__(
            *_lenet(), nn.Linear(400, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, classes)
        )


class CNN(nn.Sequential):
    """Two convolutions of LeNet and hidden layers of ``hidden`` and 84 units."""

    def __init__(self, hidden: int = 1000, classes: int = 10) -> None:
        super().__init__(
            *_lenet(),
            nn.Linear(400, hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, 84),
            nn.ReLU(inplace=True),
            nn.Linear(84, classes),
        )


class Residual(nn.Module):
    """Two convolutions, added to what they read."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_normed_convolution(channels, channels), *_normed_convolution(channels, channels)
        )

    def forward(self, images: Tensor) -> Tensor:
        """As large as ``images`` (batch, channels, height, width)."""
        return images + self.body(images)


class ResNet10(nn.Sequential):
    """A small residual network in the manner of DAWNBench's fastest, with one more residual.

    Args:
        classes: The number of classes.
        width: Channels relative to 64, 128, 256 and 512.
    """

    def __init__(self, classes: int = 10, width: float = 1.0) -> None:
        c1, c2, c3, c4 = (max(1, round(c * width)) for c in (64, 128, 256, 512))
        super().__init__(
            *_normed_convolution(3, c1),
            *_normed_convolution(c1, c2),
            nn.MaxPool2d(2),
            Residual(c2),
            *_normed_convolution(c2, c3),
            nn.MaxPool2d(2),
            Residual(c3),
            *_normed_convolution(c3, c4),
            nn.MaxPool2d(2),
            Residual(c4),
            nn.AdaptiveMaxPool2d(1),
            nn.Flatten(),
            nn.Linear(c4, classes),
        )


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    **{f"vgg{depth}": partial(VGG, depth) for depth in CONFIGURATIONS},
    **{f"vgg{depth}-plain": partial(VGG, depth, batch_norm=False) for depth in CONFIGURATIONS},
    "vgg19-quarter": partial(VGG, 19, width=0.25),
    "resnet10": ResNet10,
    "resnet10-small": partial(ResNet10, width=0.375),
    "resnet10-medium": partial(ResNet10, width=0.4375),
    "nin": NIN,
    "alexnet": AlexNet,
    "snn-1k": SNN,
    "snn-10k": partial(SNN, 10_000),
    "cnn-1k": CNN,
    "cnn-10k": partial(CNN, 10_000),
}


def he_initialize(network: nn.Module) -> None:
    """Keep the variance through many ReLUs (He et al., arXiv 1502.01852).

    Without batch norm, PyTorch's default lets the signal of a deep network die out.
    """
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)


def _convolution(channels: int, out: int, **arguments: int) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(channels, out, **arguments), nn.ReLU(inplace=True)


def _normed_convolution(channels: int, out: int) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(channels, out, kernel_size=3, padding=1, bias=False)
    return convolution, nn.BatchNorm2d(out), nn.ReLU(inplace=True)


def _lenet() -> tuple[nn.Module, ...]:
    return (
        *_convolution(3, 6, kernel_size=5),
        nn.MaxPool2d(2),
        *_convolution(6, 16, kernel_size=5),
        nn.MaxPool2d(2),
        nn.Flatten(),
    )
