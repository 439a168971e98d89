"""Multiply-accumulate operations of a forward pass, layer by layer."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


@dataclass
class Macs:
    """Multiply-accumulate operations: all of them, and those whose weight is not zero."""

    dense: int = 0
    effective: int = 0


def count_macs(network: nn.Module, forward: Callable[[], object]) -> dict[str, Macs]:
    """Count the multiply-accumulate operations of one forward pass, module by module.

    Counted are convolutions, matrix products and recurrent layers, where PyTorch executes them:
    in modules, in functions, in attention, as often as a shared layer is called. A product belongs
    to the module that owns the weight in it; one without a weight of the network (attention's
    scores, a weight that is computed) to the innermost module that is running, and counts in full.
    Not counted are biases, norms, activations, pooling, embeddings, interpolation, and operators of
    other libraries without a formula of ``torch.utils.flop_counter.register_flop_formula``. Padding
    counts as if it were multiplied, as everywhere in the field.

    Args:
        network: The network that ``forward`` runs.
        forward: Runs the network once.

    Returns:
        Name of each module in ``network`` that multiplies, as in ``named_modules()``, to its count.
    """
    counter = _Counter(network)
    fast = torch.backends.mha.get_fastpath_enabled()
    # the fast path is a single operator, in which no product can be seen
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        # in inference mode layers arrive whole, not as the products that are counted
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.compiler.set_stance("force_eager"),
            counter.watching(),
            counter,
        ):
            forward()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.found


class _Counter(TorchDispatchMode):
    supports_higher_order_operators = True  # flex_attention is one

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.modules = dict(network.named_modules())
        self.owners: dict[int, list[str]] = {}
        for name, module in self.modules.items():
            for parameter in module.parameters(recurse=False):
                self.owners.setdefault(_storage(parameter), []).append(name)
        self.copies: list[Tensor] = []
        self.running = [""]
        self.found: dict[str, Macs] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        with ExitStack() as hooks:
            for name, module in self.modules.items():
                if isinstance(module, torch.jit.ScriptModule):  # counted where it stands
                    continue

                def enter(*_: object, name: str = name) -> None:
                    self.running.append(name)

                def leave(*_: object) -> None:
                    self.running.pop()

                hooks.callback(module.register_forward_pre_hook(enter).remove)
                hooks.callback(module.register_forward_hook(leave, always_call=True).remove)
            yield

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        operator = getattr(func, "_overloadpacket", func)  # one of higher order has no overloads
        if operator is torch.ops.aten._to_copy and (owners := self.owners.get(_storage(args[0]))):
            self.owners[_storage(out)] = owners  # autocast multiplies by copies of the weights
            self.copies.append(out)  # or another tensor might have its storage
        if products := _PRODUCTS.get(operator.__name__):
            for macs, operands in products(out, *args):
                self.add(macs, operands)
        elif formula := flop_registry.get(operator):  # of attention, and of users' own operators
            self.add(formula(*args, **kwargs, out_val=out) // 2, ())
        return out

    def add(self, macs: int, operands: Sequence[Tensor]) -> None:
        for operand in reversed(operands):  # the weight comes last, as in x @ W.T
            owners = self.owners.get(_storage(operand))
            if owners:
                name = self.running[-1] if self.running[-1] in owners else owners[0]
                effective = macs * nonzeros(operand) // max(1, operand.numel())
                break
        else:
            name, effective = self.running[-1], macs
        found = self.found.setdefault(name, Macs())
        found.dense += macs
        found.effective += effective


Products = list[tuple[int, Sequence[Tensor]]]


def _matmul(out: Tensor, a: Tensor, b: Tensor, *_: object) -> Products:
    return [(a.numel() * (b.shape[-1] if b.dim() > 1 else 1), (a, b))]


def _add_matmul(out: Tensor, added: Tensor, a: Tensor, b: Tensor, *_: object) -> Products:
    return _matmul(out, a, b)


def _convolution(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: object,
    stride: object,
    padding: object,
    dilation: object,
    transposed: bool,
    *_: object,
) -> Products:
    positions = math.prod((x if transposed else out).shape[2:])
    return [(len(x) * positions * weight.numel(), (weight,))]


def _one_way(out: Tensor, x: Tensor, weight: Tensor, *_: object) -> Products:
    return _convolution(out, x, weight, None, None, None, None, transposed=False)


def _bilinear(out: Tensor, a: Tensor, weight: Tensor, *_: object) -> Products:
    return [(out.numel() // len(weight) * weight.numel(), (weight,))]


def _attention(out: object, query: Tensor, key: Tensor, value: Tensor, *_: object) -> Products:
    keys, scores = key.shape[-2], query.numel() // query.shape[-1]
    return [(scores * keys * (query.shape[-1] + value.shape[-1]), ())]


def _onednn_rnn(out: object, x: Tensor, input: Tensor, hidden: Tensor, *_: object) -> Products:
    steps = x.numel() // x.shape[-1]
    return [(steps * weight.numel(), (weight,)) for weight in (input, hidden)]


def _cudnn_rnn(out: object, x: Tensor, weights: Sequence[Tensor], *_: object) -> Products:
    steps = x.numel() // x.shape[-1]
    return [(steps * weight.numel(), (weight,)) for weight in weights if weight.dim() == 2]


# torch.utils.flop_counter lacks some of them, and does not say which operand is the weight
_PRODUCTS: dict[str, Callable[..., Products]] = {
    "mm": _matmul,
    "bmm": _matmul,
    "mv": _matmul,
    "dot": _matmul,
    "_int_mm": _matmul,
    "_scaled_mm": _matmul,
    "addmm": _add_matmul,
    "addbmm": _add_matmul,
    "baddbmm": _add_matmul,
    "addmv": _add_matmul,
    "convolution": _convolution,
    "_convolution": _convolution,
    "convolution_overrideable": _convolution,
    "cudnn_convolution": _one_way,
    "_slow_conv2d_forward": _one_way,
    "_trilinear": _bilinear,
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_flash_attention": _attention,
    "_scaled_dot_product_efficient_attention": _attention,
    "_scaled_dot_product_cudnn_attention": _attention,
    "mkldnn_rnn_layer": _onednn_rnn,
    "_cudnn_rnn": _cudnn_rnn,
}


def nonzeros(tensor: Tensor) -> int:
    """How many values of ``tensor`` are not zero."""
    return int((tensor != 0).count_nonzero())  # of float8 itself there is no count_nonzero


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
