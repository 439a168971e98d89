"""Networks of other libraries, and small ones for each situation that a layer can be in."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm


def called(network: nn.Module, *inputs: Any) -> Any:
    """The outputs of a network."""
    return network(*inputs)


@dataclass(frozen=True)
class Network:
    """How to build a network and what to feed it.

    Attributes:
        family: What it is one of.
        build: Makes it, with random weights.
        inputs: Makes the arguments of its forward pass, two samples.
        smooth: Outputs that change little when weights change little, of two samples each; boxes
            that are kept or dropped do not.
    """

    family: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]
    smooth: Callable[..., Any] = called


def images(size: int, channels: int = 3) -> tuple[Tensor]:
    """Two images."""
    return (torch.randn(2, channels, size, size),)


def tokens() -> tuple[Tensor]:
    """Two sentences."""
    return (torch.randint(50, (2, 9)),)


def sequences() -> tuple[Tensor]:
    """Two sequences of 9 vectors."""
    return (torch.randn(2, 9, 32),)


class Recurrent(nn.Module):
    """A recurrent classifier of sentences."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 32)
        self.recurrent = kind(32, 64, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(128, 10)

    def forward(self, sentences: Tensor) -> Tensor:
        """Logits, ``(batch, 10)``."""
        return self.head(self.recurrent(self.embedding(sentences))[0][:, -1])


class Cell(nn.Module):
    """A loop over an LSTM cell."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(32, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, vectors: Tensor) -> Tensor:
        """Logits, ``(batch, 10)``."""
        state = None
        for vector in vectors.unbind(1):
            state = self.cell(vector, state)
        return self.head(state[0])


class CrossAttention(nn.Module):
    """Attention whose keys and values are of other widths, with three projections of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.wider = nn.Linear(32, 64)
        self.attention = nn.MultiheadAttention(64, 4, kdim=32, vdim=32, batch_first=True)

    def forward(self, vectors: Tensor) -> Tensor:
        """Vectors, ``(batch, length, 64)``."""
        return self.attention(self.wider(vectors), vectors, vectors)[0]


class LanguageModel(nn.Module):
    """Next words; the output layer has the weight of the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.output = nn.Linear(32, 50)
        self.output.weight = self.embedding.weight

    def forward(self, sentences: Tensor) -> Tensor:
        """Logits, ``(batch, length, 50)``."""
        mask = nn.Transformer.generate_square_subsequent_mask(sentences.shape[1])
        return self.output(self.encoder(self.embedding(sentences), mask, is_causal=True))


def layer_used_twice() -> nn.Module:
    """One layer in two places."""
    shared = nn.Linear(32, 32)
    return nn.Sequential(nn.Linear(32, 32), shared, nn.ReLU(), shared, nn.Linear(32, 10))


def weight_used_twice() -> nn.Module:
    """Two layers, each with a bias of its own, that share their weight."""
    network = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.Linear(32, 10))
    network[2].weight = network[0].weight
    return network


def parametrized(parametrization: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """A layer whose weight is computed from other parameters, and one whose is not."""
    return nn.Sequential(parametrization(nn.Linear(32, 32)), nn.ReLU(), nn.Linear(32, 10))


def weight_norm_by_hook(layer: nn.Module) -> nn.Module:
    """Weight norm as a hook, which torch deprecates and many networks have."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return weight_norm(layer)


def lazy() -> nn.Module:
    """Layers that have no weights before their first batch."""
    return nn.Sequential(nn.LazyConv2d(16, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10))


def lazy_after_a_batch() -> nn.Module:
    """The same when they have seen a batch."""
    network = lazy()
    with torch.no_grad():
        network(*images(8))
    return network


def convolutions() -> nn.Module:
    """One of each: dilated, grouped, depthwise, transposed, reflecting, strided, rectangular."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=2, dilation=2),
        nn.Conv2d(16, 32, 3, padding=1, groups=4),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding="same", groups=32),
        nn.ConvTranspose2d(32, 16, 4, stride=2, padding=1),
        nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(16, 16, (1, 5), stride=(1, 2), padding=(0, 2)),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 32 * 16, 10),
    )


def one_and_three_dimensions() -> nn.Module:
    """Convolutions in one and in three dimensions, plain, transposed and grouped."""
    return nn.Sequential(
        nn.Conv1d(32, 32, 3, padding=2, dilation=2),
        nn.ConvTranspose1d(32, 32, 3, groups=2),
        nn.Unflatten(1, (8, 2, 2)),
        nn.Conv3d(8, 8, (1, 1, 3)),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


def sequences_of_channels() -> tuple[Tensor]:
    """Two signals of 32 channels."""
    return (torch.randn(2, 32, 16),)


def transformer_encoder() -> nn.Module:
    """The one of torch, with the fast path that reads weights rather than call layers."""
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=False)
    return nn.TransformerEncoder(layer, 2)


SMALL = {
    "LSTM": (partial(Recurrent, nn.LSTM), tokens),
    "GRU": (partial(Recurrent, nn.GRU), tokens),
    "LSTM cell": (Cell, sequences),
    "Transformer encoder": (transformer_encoder, sequences),
    "cross-attention": (CrossAttention, sequences),
    "tied embeddings": (LanguageModel, tokens),
    "layer used twice": (layer_used_twice, sequences),
    "weight used twice": (weight_used_twice, sequences),
    "weight norm": (partial(parametrized, parametrizations.weight_norm), sequences),
    "weight norm, by a hook": (partial(parametrized, weight_norm_by_hook), sequences),
    "spectral norm": (partial(parametrized, parametrizations.spectral_norm), sequences),
    "orthogonal": (partial(parametrized, parametrizations.orthogonal), sequences),
    "lazy": (lazy, partial(images, 8)),
    "lazy, after a batch": (lazy_after_a_batch, partial(images, 8)),
    "convolutions": (convolutions, partial(images, 16)),
    "convolutions, 1-d and 3-d": (one_and_three_dimensions, sequences_of_channels),
}

# NAME:SIZE are images of that size, 64 without; NAME=SIZE is also told to the network.
TIMM = {
    "residual": "resnet18 resnext26ts seresnet18 ecaresnet26t skresnet18 resnest14d dla46_c "
    "hrnet_w18_small densenet121 dpn48b inception_v3:96 repvgg_a0 nf_resnet26 regnety_002 "
    "ese_vovnet19b_slim hgnetv2_b0",
    "depthwise": "mobilenetv2_050 mobilenetv3_small_050 mobilenetv4_conv_small efficientnet_lite0 "
    "tf_efficientnet_b0 tf_efficientnet_cc_b0_4e mixnet_s ghostnet_050 lcnet_035 hardcorenas_a "
    "rexnet_100 mnasnet_small fbnetc_100 mobileone_s0 convnext_atto convnextv2_atto "
    "inception_next_atto starnet_s050 mambaout_femto repvit_m0_9",
    "attention": "vit_tiny_patch16_224=64 eva02_tiny_patch14_224=56 "
    "swin_tiny_patch4_window7_224=56 coat_tiny=64 crossvit_tiny_240:240 levit_128s:224 "
    "pit_ti_224=64 xcit_nano_12_p16_224:64 visformer_tiny:224 botnet26t_256=128 halonet26t:256 "
    "lambda_resnet26t=128 cait_xxs24_224=64 maxvit_rmlp_pico_rw_256=64 efficientvit_m0=64 "
    "pvt_v2_b0 gcvit_xxtiny=64 mobilevit_xxs mobilevitv2_050 edgenext_xx_small fastvit_t8",
    "MLP": "mixer_s32_224=64 resmlp_12_224=64 gmlp_ti16_224=64 poolformer_s12 sequencer2d_s=56",
}


def timm_networks() -> Iterator[tuple[str, Network]]:
    """Name and network of each of :data:`TIMM`."""
    for family, entries in TIMM.items():
        for entry in entries.split():
            name, _, told = entry.partition("=")
            name, _, size = name.partition(":")
            arguments = {"img_size": int(told)} if told else {}
            arguments |= {"pretrained": False, "num_classes": 10}
            build = partial(timm.create_model, name, **arguments)
            yield name, Network(f"timm, {family}", build, partial(images, int(told or size or 64)))


def segmented(network: nn.Module, pictures: Tensor) -> Any:
    """The outputs for each pixel."""
    return network(pictures)["out"]


def detected(network: nn.Module, pictures: list[Tensor]) -> Any:
    """What the heads give, before boxes are chosen by their scores."""
    features = network.backbone(torch.stack(pictures))
    levels = list(features.values())
    if hasattr(network, "head"):
        return network.head(levels)
    boxes = [torch.tensor([[8.0, 8.0, 40.0, 48.0]]).to(picture) for picture in pictures]
    sizes = [(picture.shape[1], picture.shape[2]) for picture in pictures]
    regions = network.roi_heads.box_roi_pool(features, boxes, sizes)
    found = network.roi_heads.box_predictor(network.roi_heads.box_head(regions))
    return network.rpn.head(levels), found


def two_pictures(size: int) -> tuple[list[Tensor]]:
    """Two pictures, as detectors take them."""
    return ([*torch.rand(2, 3, size, size)],)


def videos() -> tuple[Tensor]:
    """Two videos of 8 frames."""
    return (torch.randn(2, 3, 8, 64, 64),)


def torchvision_networks() -> Iterator[tuple[str, Network]]:
    """Name and network of each of torchvision's, of every task it has."""
    models = torchvision.models
    for name in ("alexnet", "squeezenet1_1", "googlenet", "mobilenet_v2", "shufflenet_v2_x0_5"):
        more = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
        build = partial(getattr(models, name), num_classes=10, **more)
        yield name, Network("torchvision, classification", build, partial(images, 64))
    vit = partial(models.VisionTransformer, 64, 16, 4, 4, 128, 256, num_classes=10)
    yield "VisionTransformer", Network("torchvision, classification", vit, partial(images, 64))
    nothing = {"weights": None, "weights_backbone": None}
    for name in ("fasterrcnn_mobilenet_v3_large_320_fpn", "retinanet_resnet50_fpn"):
        build = partial(getattr(models.detection, name), num_classes=5, min_size=64, **nothing)
        inputs = partial(two_pictures, 64)
        yield name, Network("torchvision, detection", build, inputs, detected)
    for name in ("lraspp_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large"):
        build = partial(getattr(models.segmentation, name), num_classes=5, **nothing)
        yield name, Network("torchvision, segmentation", build, partial(images, 64), segmented)
    video = partial(models.video.mc3_18, num_classes=10)
    yield "mc3_18", Network("torchvision, video", video, videos)


def networks() -> dict[str, Network]:
    """Every network by name."""
    small = {name: Network("small", build, inputs) for name, (build, inputs) in SMALL.items()}
    return {**small, **dict(timm_networks()), **dict(torchvision_networks())}
