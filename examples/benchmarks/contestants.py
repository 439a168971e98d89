"""The networks that the speed benchmarks run, and everything that can run them."""

import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from shared import PAPER_RANKS, VGG
from torch import Tensor, nn

from slimnets.acceleration import accelerate, export
from slimnets.acceleration.opaque import Swapped
from slimnets.acceleration.torch_layers import csr
from slimnets.layers import replace
from slimnets.lowrank import factorize

EAGER, COMPILED, PT2 = "PyTorch eager", "torch.compile", "torch.export"
EXPORTS = ("ONNX Runtime", "OpenVINO f32", "OpenVINO default", PT2)
PACKAGES = ("numba", "onnxruntime", "openvino")
FACTORIZED_ZEROS = 0.9
CSR_FROM = 0.8
TURN_SECONDS = 0.02

Call = Callable[[], Any]


def resnet18() -> nn.Module:
    """ResNet-18 for 224 by 224 images."""
    import torchvision

    return torchvision.models.resnet18()  # type: ignore[no-any-return]


def transformer() -> nn.Module:
    """Two encoder layers of width 512."""
    layer = nn.TransformerEncoderLayer(512, 8, 2048, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


class CausalBlock(nn.Module):
    """Two dilated convolutions that see what came before, and a residual sum."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.past = 4 * dilation  # of a kernel of five
        self.convolutions = nn.ModuleList(
            nn.Conv1d(channels, channels, 5, padding=self.past, dilation=dilation) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        """A sequence (batch, channels, steps) of the same shape."""
        y = x
        for convolution in self.convolutions:
            y = torch.relu(convolution(y)[:, :, : -self.past])
        return torch.relu(x + y)


def tcn() -> nn.Module:
    """A temporal convolutional network (Bai et al. 2018, arXiv 1803.01271), 64 channels wide."""
    blocks = (CausalBlock(64, 2**level) for level in range(5))
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(64, 10))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "vgg19": (lambda: VGG(19), (3, 32, 32)),
    "resnet18": (resnet18, (3, 224, 224)),
    "transformer": (transformer, (128, 512)),
    "tcn": (tcn, (64, 200)),
    "tiny": (lambda: VGG(19, width=1 / 8), (3, 32, 32)),
}

RANKS = {
    "vgg19": PAPER_RANKS,
    "tiny": {name: max(1, rank // 8) for name, rank in PAPER_RANKS.items()},
}


def ours(zeros: float) -> str:
    """The name of the accelerated network with this share of zeros."""
    return f"slimnets, {100 * zeros:g} %"


def factorized(runtime: str) -> str:
    """The name of the factorized network in ``runtime``."""
    return f"{runtime}, factorized"


def pruned(name: str, zeros: float, low_rank: bool = False) -> nn.Module:
    """The network with this share of random zeros in every layer, scaled to keep its signal."""
    torch.manual_seed(0)
    network = NETWORKS[name][0]().eval().requires_grad_(False)
    if low_rank:
        network = factorize(network, RANKS[name]).requires_grad_(False)
    for parameter in network.parameters():
        if parameter.dim() > 1 and zeros:
            order = torch.randperm(parameter.numel())[: round(zeros * parameter.numel())]
            parameter.view(-1)[order] = 0.0
            parameter /= (1.0 - zeros) ** 0.5
    return network


def calls_within(
    network: nn.Module, x: torch.Tensor, *kinds: type[nn.Module]
) -> list[tuple[str, Any, tuple[Any, ...], Any]]:
    """Name, module, arguments and output of each call of a module of these kinds."""
    found: list[tuple[str, Any, tuple[Any, ...], Any]] = []
    hooks = [
        module.register_forward_hook(lambda m, args, out, n=name: found.append((n, m, args, out)))
        for name, module in network.named_modules()
        if isinstance(module, kinds)
    ]
    network(x)
    for hook in hooks:
        hook.remove()
    return found


def with_csr(network: nn.Module, x: torch.Tensor) -> nn.Module:
    """``network`` with a CSR product in the place of every layer that it makes faster."""
    for name, layer, (image, *_), _ in calls_within(network, x, nn.Conv2d, nn.Linear):
        product = csr(layer, image, relu=False)
        if product is not None:
            pair = {"dense": partial(layer, image), "csr": partial(product, image)}
            times = in_turn(pair, 3)
            if min(times["csr"]) < min(times["dense"]):
                network = replace(network, name, Swapped(layer, product))
    return network


def onnx_runtime(path: Path, x: torch.Tensor, threads: int) -> Call:
    """The exported network in ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    # its threads would go on spinning in the next contestant's turn
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, feed)


def openvino(path: Path, x: torch.Tensor, threads: int, exact: bool) -> Call:
    """The exported network in OpenVINO, in float32 or in its default precision."""
    import openvino as ov

    settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    if exact:
        settings["INFERENCE_PRECISION_HINT"] = "f32"
    request = ov.Core().compile_model(path, "CPU", settings).create_infer_request()
    array = x.numpy()
    return lambda: request.infer([array])


def exported(network: nn.Module, x: torch.Tensor, threads: int) -> dict[str, Call]:
    """What :func:`slimnets.export` writes, in every runtime that is installed."""
    calls: dict[str, Call] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        makers = (
            lambda: onnx_runtime(path, x, threads),
            lambda: openvino(path, x, threads, True),
            lambda: openvino(path, x, threads, False),
        )
        for label, make in zip(EXPORTS, makers, strict=False):
            try:
                if not path.exists():
                    export(network, x, path)
                calls[label] = make()
            except ImportError as missing:
                print(f"{label} is left out: {missing}", file=sys.stderr)
        program = torch.export.load(export(network, x, Path(folder) / "network.pt2"))
    calls[PT2] = partial(program.module(), x)
    return calls


def contestants(
    name: str, x: torch.Tensor, threads: int, sparsities: list[float], compiled: bool
) -> tuple[dict[str, Call], dict[str, Any]]:
    """Everything to compare, by name; and the reports of ours."""
    dense = pruned(name, 0.0)
    calls: dict[str, Call] = {EAGER: partial(dense, x)}
    reports: dict[str, Any] = {}
    if compiled:
        torch.compiler.reset()  # or a second batch size is compiled for any, and slower
        calls[COMPILED] = partial(torch.compile(dense, dynamic=False), x)
    calls |= exported(dense, x, threads)

    def add(label: str, network: nn.Module) -> None:
        fast = accelerate(network, x)
        reports[label] = fast.report.to_dict()
        calls[label] = partial(fast, x)

    for zeros in sparsities:
        add(ours(zeros), pruned(name, zeros))
        if zeros >= CSR_FROM:
            product = with_csr(pruned(name, zeros), x)
            calls[f"torch CSR, {100 * zeros:g} %"] = partial(product, x)
    if name in RANKS:
        pairs = pruned(name, 0.0, low_rank=True)
        calls[factorized(EAGER)] = partial(pairs, x)
        for label, call in exported(pairs, x, threads).items():
            calls[factorized(label)] = call
        add(factorized("slimnets"), pairs)
        both = f"{factorized('slimnets')}, {100 * FACTORIZED_ZEROS:g} %"
        add(both, pruned(name, FACTORIZED_ZEROS, low_rank=True))
    return calls, reports


def in_turn(calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every call, round by round.

    A call that is shorter than a turn is repeated, and the turn's median counts: the others have
    emptied the caches and woken threads, which no service that runs one network would see.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            turn: list[float] = []
            while sum(turn) < TURN_SECONDS:
                start = perf_counter()
                call()
                turn.append(perf_counter() - start)
            times[name].append(sorted(turn)[len(turn) // 2] * 1e3)
    return times
