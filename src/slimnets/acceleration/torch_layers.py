"""Layers that PyTorch computes: dense with weights packed once, or as a CSR product."""

import warnings
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from slimnets.acceleration.nodes import is_unaltered, module_of


class PackedConv2d(nn.Module):
    """A convolution whose weight lies in oneDNN's blocked layout, with ReLU if asked.

    PyTorch's own layer reorders its weight at every call, which at batch 1 takes longer than the
    convolution of a deep layer.
    """

    def __init__(self, conv: nn.Conv2d, image: Tensor, relu: bool = False) -> None:
        super().__init__()
        self.padding = [int(p) for p in conv.padding]
        self.stride, self.dilation = list(conv.stride), list(conv.dilation)
        self.groups = conv.groups
        self.activation = "relu" if relu else "none"
        self.bias = conv.bias
        self.weight = conv.weight
        self.shape = list(image.shape)
        self._pack()

    def _pack(self) -> None:
        places = (self.padding, self.stride, self.dilation, self.groups, self.shape)
        reorder = torch.ops.mkldnn._reorder_convolution_weight
        self.packed = reorder(self.weight.detach(), *places)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (batch, channels, rows, columns) convolved."""
        places = (self.padding, self.stride, self.dilation, self.groups)
        convolve = torch.ops.mkldnn._convolution_pointwise
        return convolve(x, self.packed, self.bias, *places, self.activation, [], "")  # type: ignore[no-any-return]

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "packed"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._pack()


class CsrLayer(nn.Module):
    """A convolution or linear layer as a product of a CSR matrix and unfolded columns."""

    def __init__(self, layer: nn.Conv2d | nn.Linear, relu: bool = False) -> None:
        super().__init__()
        self.layer, self.relu = layer, relu
        self._compress()

    def _compress(self) -> None:
        with warnings.catch_warnings():  # torch calls its CSR tensors beta
            warnings.filterwarnings("ignore", "Sparse CSR tensor support", UserWarning)
            self.weight = self.layer.weight.detach().flatten(1).to_sparse_csr()

    def forward(self, x: Tensor) -> Tensor:
        """What the layer computes of ``x``."""
        layer = self.layer
        if isinstance(layer, nn.Linear):
            y = (self.weight @ x.reshape(-1, x.shape[-1]).t()).t()
            y = y.reshape(*x.shape[:-1], len(layer.weight))
            y = y if layer.bias is None else y + layer.bias
        else:
            y = self._convolve(layer, x)
        return y.relu_() if self.relu else y

    def _convolve(self, layer: nn.Conv2d, x: Tensor) -> Tensor:
        h, w = (
            (x.shape[2 + i] + 2 * int(layer.padding[i]) - layer.dilation[i] * (k - 1) - 1)
            // layer.stride[i]
            + 1
            for i, k in enumerate(layer.kernel_size)
        )
        places = (layer.dilation, layer.padding, layer.stride)
        columns = F.unfold(x, layer.kernel_size, *places)  # type: ignore[arg-type]
        batch, taps, pixels = columns.shape
        flat = columns.transpose(0, 1).reshape(taps, batch * pixels)
        y = self.weight @ flat
        y = y if layer.bias is None else y + layer.bias[:, None]
        return y.reshape(len(y), batch, h, w).transpose(0, 1).contiguous()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "weight"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._compress()


def packed(layer: nn.Module | None, x: Tensor, relu: bool) -> nn.Module | None:
    """``layer`` with a packed weight, or ``None`` where PyTorch here cannot pack it."""
    if not isinstance(layer, nn.Conv2d) or layer.padding_mode != "zeros" or x.dim() != 4:
        return None
    if isinstance(layer.padding, str) or not torch.backends.mkldnn.is_available():
        return None
    return _checked(lambda: PackedConv2d(layer, x, relu), layer, x, relu)


def csr(layer: nn.Module | None, x: Tensor, relu: bool) -> nn.Module | None:
    """``layer`` as a CSR product, or ``None`` where that does not work."""
    if isinstance(layer, nn.Conv2d):
        plain = layer.groups == 1 and not isinstance(layer.padding, str)
        if not plain or layer.padding_mode != "zeros" or x.dim() != 4:
            return None
    elif not isinstance(layer, nn.Linear):
        return None
    return _checked(lambda: CsrLayer(layer, relu), layer, x, relu)


def _checked(make: Any, layer: nn.Module, x: Tensor, relu: bool) -> nn.Module | None:
    """What ``make`` makes, if it computes the same; private operators come and go."""
    try:
        new: nn.Module = make()
        expected = layer(x).relu() if relu else layer(x)
        right = torch.allclose(new(x), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    except (RuntimeError, AttributeError, TypeError):
        return None
    return new if right else None


def following_relu(node: fx.Node) -> fx.Node | None:
    """The ReLU that alone reads ``node``, if there is one."""
    if len(node.users) != 1:
        return None
    user = next(iter(node.users))
    module = module_of(user)
    kind = user.target if module is None else is_unaltered(module) and type(module)
    return user if kind in (nn.ReLU, F.relu, torch.relu, "relu") and user.args == (node,) else None


def exchange(traced: fx.GraphModule, node: fx.Node, new: nn.Module, relu: fx.Node | None) -> None:
    """Put ``new`` in the place of the layer that ``node`` calls, and of the ReLU after it."""
    name = f"{node.name}_dense"
    traced.add_module(name, new)
    node.target = name
    if relu is not None:
        relu.replace_all_uses_with(node)
        traced.graph.erase_node(relu)
