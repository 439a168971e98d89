"""Attention with masks: what stands for PyTorch's layers computes the same, and fails with them."""

import copy
import itertools
import math
import pickle
import warnings

import pytest
import torch
from torch import Tensor, nn

from slimnets.acceleration.attention import traceable
from slimnets.acceleration.export import export
from slimnets.acceleration.trace import trace
from tests.acceleration.networks import computed_by

BATCH, HEADS, TARGETS, SOURCES, FEATURES = 3, 4, 5, 6, 16


def graph_of(model: nn.Module, arguments: int) -> nn.Module:
    """What the layers are exchanged in; nothing of PyTorch's attention is left in it."""
    graph = trace(traceable(model), arguments)
    assert graph is not None
    kinds = nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder
    assert not any(isinstance(m, kinds) for m in graph.modules())
    return graph


def felt(model: nn.Module) -> nn.Module:
    """Biases and gains that are not the ones everything begins with."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 1.0, 0.5)
    return model.eval().requires_grad_(False)


def mask(kind: str, *shape: int) -> Tensor | None:
    """Some positions masked, and all sources of the second target or sample."""
    if kind == "none":
        return None
    masked = torch.rand(shape) > 0.7
    masked[..., 0] = False
    masked[..., 1, :] = True
    if kind == "bool":
        return masked
    return torch.zeros(shape).masked_fill(masked, -math.inf) + (
        torch.randn(shape) * (kind == "added")
    )


def outcome(model: nn.Module, *args, **kwargs):
    """The result, or the error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's, about masks of two types and nested tensors
        try:
            return model(*args, **kwargs)
        except Exception as error:
            return error


def assert_same(found, expected):
    assert not isinstance(found, Exception), found
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, equal_nan=True)


KINDS = ("none", "bool", "float", "added")


class Attends(nn.Module):
    """``nn.MultiheadAttention`` with its options fixed, the inputs and masks as arguments."""

    def __init__(self, attention: nn.MultiheadAttention, same: bool, **options: bool) -> None:
        super().__init__()
        self.attention, self.same, self.options = attention, same, options

    def forward(self, query, memory, key_padding_mask, attn_mask):
        memory = query if self.same else memory
        masks = {"key_padding_mask": key_padding_mask, "attn_mask": attn_mask}
        return self.attention(query, memory, memory, **masks, **self.options)


@pytest.mark.parametrize("same", [True, False], ids=["self", "cross"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("heads", [HEADS, 1])
@pytest.mark.parametrize(
    "options",
    [
        {"need_weights": False},
        {"need_weights": True},
        {"need_weights": True, "average_attn_weights": False},
        {"need_weights": False, "is_causal": True},
        {"need_weights": True, "is_causal": True},
    ],
    ids=["result", "weights", "weights of heads", "causal", "causal weights"],
)
def test_attention_with_every_pair_of_masks(same, batch_first, heads, options):
    attention = felt(nn.MultiheadAttention(FEATURES, heads, batch_first=batch_first))
    model = Attends(attention, same, **options)
    graph = graph_of(model, 4)
    targets, sources = TARGETS, TARGETS if same else SOURCES
    for padding, dims, kind in itertools.product(KINDS, (2, 3), KINDS):
        query, memory = torch.randn(BATCH, targets, FEATURES), torch.randn(BATCH, sources, FEATURES)
        if not batch_first:
            query, memory = query.transpose(0, 1), memory.transpose(0, 1)
        shape = (targets, sources) if dims == 2 else (BATCH * heads, targets, sources)
        inputs = query, memory, mask(padding, BATCH, sources), mask(kind, *shape)
        expected, found = outcome(model, *inputs), outcome(graph, *inputs)
        if isinstance(expected, Exception):
            assert isinstance(found, Exception)
        else:
            assert_same(found, expected)


@pytest.mark.parametrize("kdim", [None, 8])
@pytest.mark.parametrize("bias", [True, False])
def test_attention_of_samples_and_of_other_widths(kdim, bias):
    attention = nn.MultiheadAttention(FEATURES, HEADS, bias=bias, kdim=kdim, vdim=kdim)
    model = Attends(felt(attention), same=False)
    graph = graph_of(model, 4)
    for kind in KINDS:
        inputs = torch.randn(TARGETS, FEATURES), torch.randn(SOURCES, kdim or FEATURES)
        masks = mask(kind, SOURCES) if kind == "none" else mask(kind, 2, SOURCES)[0]
        for attn_mask in (mask(kind, TARGETS, SOURCES), mask(kind, HEADS, TARGETS, SOURCES)):
            assert_same(graph(*inputs, masks, attn_mask), model(*inputs, masks, attn_mask))


def test_the_same_tensor_given_three_times():
    attention = felt(nn.MultiheadAttention(FEATURES, HEADS, batch_first=True))
    graph = graph_of(attention, 4)
    x, padding = torch.randn(BATCH, TARGETS, FEATURES), mask("bool", BATCH, TARGETS)
    for inputs in ((x, x, x), (x, x.clone(), x)):  # NaN from the fused kernel, zero without
        assert_same(graph(*inputs, padding), attention(*inputs, padding))


MISFITS = {
    "padding of another batch": {"key_padding_mask": torch.zeros(1, TARGETS, dtype=torch.bool)},
    "padding of another length": {"key_padding_mask": torch.zeros(BATCH, 2, dtype=torch.bool)},
    "a mask for every sample": {"attn_mask": torch.zeros(BATCH, TARGETS, TARGETS)},
    "a mask of one row": {"attn_mask": torch.zeros(1, TARGETS, dtype=torch.bool)},
    "a mask of another rank": {"attn_mask": torch.zeros(TARGETS)},
    "a mask of integers": {"attn_mask": torch.zeros(TARGETS, TARGETS, dtype=torch.long)},
    "a hint without a mask": {"is_causal": True, "need_weights": False},
}


@pytest.mark.parametrize("name", MISFITS)
@pytest.mark.parametrize("batch_first", [True, False])
def test_masks_that_do_not_fit_are_left_to_pytorch(name, batch_first):
    attention = felt(nn.MultiheadAttention(FEATURES, HEADS, batch_first=batch_first))
    x = torch.randn(BATCH, TARGETS, FEATURES)
    x = x if batch_first else x.transpose(0, 1)
    stand = traceable(attention)
    expected, found = (outcome(m, x, x, x, **MISFITS[name]) for m in (attention, stand))
    if isinstance(expected, Exception):
        assert isinstance(found, Exception)
    else:  # an error here costs time, no result
        assert isinstance(found, Exception) or torch.allclose(found[0], expected[0], atol=1e-5)


@pytest.mark.parametrize(
    "shapes",
    [
        [(BATCH, TARGETS), (BATCH, SOURCES), (BATCH, SOURCES + 1)],
        [(BATCH, TARGETS), (1, SOURCES), (1, SOURCES)],
        [(BATCH, TARGETS), (SOURCES,), (SOURCES,)],
        [(1, BATCH, TARGETS), (1, BATCH, SOURCES), (1, BATCH, SOURCES)],
    ],
)
def test_inputs_that_do_not_fit_are_errors(shapes):
    attention = felt(nn.MultiheadAttention(FEATURES, HEADS, batch_first=True))
    inputs = [torch.randn(*shape, FEATURES) for shape in shapes]
    for model in (attention, traceable(attention)):
        assert isinstance(outcome(model, *inputs), Exception)


def encoder_layer(**options) -> nn.TransformerEncoderLayer:
    options = {"activation": "gelu", "batch_first": True, **options}
    return felt(nn.TransformerEncoderLayer(FEATURES, HEADS, 24, **options))


LAYERS = {
    "fused": {},
    "norm first": {"norm_first": True},
    "sequence first": {"batch_first": False},
    "own activation": {"activation": nn.functional.silu},
    "no bias": {"bias": False},
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_encoders_with_every_pair_of_masks(name, depth):
    model: nn.Module = encoder_layer(**LAYERS[name])
    if depth:
        model = felt(nn.TransformerEncoder(model, depth, nn.LayerNorm(FEATURES)))
    graph = graph_of(model, 4)
    x = torch.randn(BATCH, TARGETS, FEATURES)
    x = x if LAYERS[name].get("batch_first", True) else x.transpose(0, 1)
    for kind, padding in itertools.product(KINDS, KINDS):
        masks = mask(kind, TARGETS, TARGETS), mask(padding, BATCH, TARGETS)
        for is_causal in (False, True):
            inputs = x, *masks, is_causal
            expected, found = outcome(model, *inputs), outcome(graph, *inputs)
            if isinstance(expected, Exception):
                assert isinstance(found, Exception)
            else:
                assert_same(found, expected)


LENGTHS = {"all": [5, 5, 5], "some": [5, 2, 4], "shorter": [1, 3, 2], "none": [0, 5, 3]}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("gap", [False, True])
def test_padding_that_pytorch_drops(lengths, gap):
    model = felt(nn.TransformerEncoder(encoder_layer(), 2, nn.LayerNorm(FEATURES)))
    x = torch.randn(BATCH, TARGETS, FEATURES)
    padding = torch.arange(TARGETS) >= torch.tensor(lengths)[:, None]
    x[padding] = torch.nan
    if gap:  # PyTorch computes it all
        x.nan_to_num_()
        padding[1, 1:3] = torch.tensor([True, False])
    graph = graph_of(model, 3)
    for given in (padding, torch.zeros(padding.shape).masked_fill(padding, -math.inf)):
        assert_same(graph(x, None, given), outcome(model, x, None, given))


def test_nothing_but_padding_is_an_error():
    model = felt(nn.TransformerEncoder(encoder_layer(), 1))
    inputs = torch.randn(1, 3, FEATURES), None, torch.ones(1, 3, dtype=torch.bool)
    for network in (model, traceable(model)):
        assert isinstance(outcome(network, *inputs), Exception)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("depth", [0, 2])
def test_decoders_with_masks(batch_first, norm_first, depth):
    options = {"batch_first": batch_first, "norm_first": norm_first}
    model: nn.Module = felt(nn.TransformerDecoderLayer(FEATURES, HEADS, 24, **options))
    if depth:
        model = felt(nn.TransformerDecoder(model, depth, nn.LayerNorm(FEATURES)))
    graph = graph_of(model, 7)
    inputs = torch.randn(BATCH, TARGETS, FEATURES), torch.randn(BATCH, SOURCES, FEATURES)
    if not batch_first:
        inputs = tuple(x.transpose(0, 1) for x in inputs)
    causal = nn.Transformer.generate_square_subsequent_mask(TARGETS)
    for kind in KINDS:
        masks = (
            mask(kind, TARGETS, TARGETS),
            mask(kind, TARGETS, SOURCES),
            mask(kind, BATCH, TARGETS),
            mask(kind, BATCH, SOURCES),
        )
        assert_same(graph(*inputs, *masks, False), outcome(model, *inputs, *masks, False))
    given = *inputs, causal, None, None, None, True
    assert_same(graph(*given), outcome(model, *given))


class Translator(nn.Module):
    """Encoder and decoder with the masks that people use."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(encoder_layer(), 2)
        layer = nn.TransformerDecoderLayer(FEATURES, HEADS, 24, batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, 2)
        self.look = nn.MultiheadAttention(FEATURES, HEADS, batch_first=True)

    def forward(self, source, target, padding):
        causal = nn.Transformer.generate_square_subsequent_mask(TARGETS)
        memory = self.encoder(source, src_key_padding_mask=padding)
        masks = {"memory_key_padding_mask": padding, "tgt_mask": causal, "tgt_is_causal": True}
        y = self.decoder(target, memory, **masks)
        return self.look(y, memory, memory, key_padding_mask=padding)


def translator() -> tuple[nn.Module, tuple[Tensor, ...]]:
    padding = torch.arange(SOURCES) >= torch.tensor([SOURCES, 2, 4])[:, None]
    shapes = (BATCH, SOURCES, FEATURES), (BATCH, TARGETS, FEATURES)
    return felt(Translator()), (*map(torch.randn, shapes), padding)


def test_a_whole_network_with_masks():
    model, inputs = translator()
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    for layer in layers:
        layer.weight.mul_(torch.rand_like(layer.weight) > 0.9)
    expected = outcome(model, *inputs)
    fast = computed_by("engine", model, inputs).fast
    for network in (fast, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert_same(network(*inputs), expected)
    graph = graph_of(model, 3)
    assert sum(isinstance(m, nn.Linear) for m in graph.modules()) == 2 * 4 + 2 * 8 + 4
    pickled = pickle.loads(pickle.dumps(graph))
    for batch in (1, 2):
        fewer = tuple(x[:batch] for x in inputs)
        assert_same(pickled(*fewer), outcome(model, *fewer))
        assert_same(fast(*fewer), outcome(model, *fewer))


def test_an_exported_network_with_masks(tmp_path):
    model, inputs = translator()
    loaded = torch.export.load(export(model, inputs, tmp_path / "net.pt2")).module()
    expected = outcome(model, *inputs)
    assert_same(loaded(*inputs), expected)
