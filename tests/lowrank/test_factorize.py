"""Factorized networks compute what they should, whatever they are made of."""

import copy
import logging
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from slimnets.distillation import DistillationModule
from slimnets.lowrank import LowRankPair, factorize, merge, plan

PAPER = [5, 24, 48, 48, 64, 128, 128, 160, 192, 256, 320, 320, 320, 320, 320, 320]


def low_rank(layer, rank):
    """``layer`` with a weight that has that rank, so that nothing is lost by a pair of it."""
    with torch.no_grad():
        out, rest = layer.weight.shape[0], layer.weight[0].numel()
        product = torch.randn(out, rank) @ torch.randn(rank, rest) / rest**0.5
        layer.weight.copy_(product.view_as(layer.weight))
    return layer


def names(net):
    return [name for name, m in net.named_modules() if isinstance(m, LowRankPair)]


def test_what_was_learned_is_kept():
    net = nn.Sequential(
        low_rank(nn.Conv1d(8, 16, 3, padding=1), 4), nn.ReLU(), low_rank(nn.Conv1d(16, 8, 1), 3)
    )
    inputs = torch.randn(2, 8, 10)
    expected = net(inputs)
    assert factorize(net, {"0": 4, "2": 3}) is net
    assert names(net) == ["0", "2"]
    torch.testing.assert_close(net(inputs), expected, rtol=0, atol=1e-5)


def test_a_root_that_is_a_layer_is_replaced():
    layer = nn.Linear(16, 16)
    pair = factorize(layer, 2)
    assert isinstance(pair, LowRankPair)
    assert isinstance(layer, nn.Linear)
    assert isinstance(merge(pair), nn.Linear)


def distilled(student):
    return DistillationModule(student=student, teacher=nn.Linear(16, 16))


WRAPS = {
    "distilled": distilled,
    "compiled": torch.compile,
    "both": lambda net: distilled(torch.compile(net)),
}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_names_are_those_of_the_compressed_network(wrap):
    net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    model = wrap(net)
    assert [row.name for row in plan(model, {"0": 2}, exclude="2")] == ["0", "2"]
    assert factorize(model, {"0": 2}, exclude="2") is model
    assert names(net) == ["0"]
    assert merge(model) is model
    assert names(net) == []


def test_a_student_that_is_itself_a_layer_is_replaced_in_its_module():
    model = distilled(nn.Linear(16, 16))
    assert factorize(model, {"": 2}) is model
    assert isinstance(model.student, LowRankPair)
    assert merge(model) is model
    assert isinstance(model.student, nn.Linear)


def test_a_layer_that_a_list_holds_too_goes_on_learning():
    class Lists(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
            self.blocks = [self.a, self.b]

        def forward(self, x):
            for block in self.blocks:
                x = block(x).relu()
            return self.head(x)

    net = factorize(Lists(), 2)
    assert names(net) == ["head"]
    net(torch.randn(3, 16)).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_it_is_idempotent():
    net = factorize(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)), {"0": 8})
    pair = net[0]
    factorize(net, 2)
    assert net[0] is pair
    assert [net[0].rank, net[1].rank] == [8, 2]
    assert names(net) == ["0", "1"]


def test_merge_computes_the_same_and_leaves_the_rest():
    net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Linear(8, 8))
    expected_layout = str(net)
    factorize(net, 2)
    images = torch.randn(2, 4, 10, 10)
    net.eval()
    expected = net(images)
    norm = net[1]
    assert merge(net) is net
    assert net[1] is norm
    assert str(net) == expected_layout
    torch.testing.assert_close(net(images), expected, rtol=0, atol=1e-5)


def test_the_papers_sixteen_ranks():
    channels = [3, 64, 64, 128, 128, *[256] * 4, *[512] * 8]
    pairs = list(pairwise(channels))
    net = nn.Sequential(*(nn.Conv2d(a, b, 3, device="meta") for a, b in pairs))
    with torch.no_grad():  # rank one: the values do not matter here, and are quick to decompose
        net = net.to_empty(device="cpu")
        for p in net.parameters():
            p.fill_(1.0)
    ranks = {str(i): rank for i, rank in enumerate(PAPER)}
    planned = plan(net, ranks)
    assert planned.ranks == ranks
    assert sum(row.before for row in planned) == 20_018_880
    after = sum(3 * rank * (a + b) for rank, (a, b) in zip(PAPER, pairs, strict=True))
    assert sum(row.after for row in planned) == after == 7_914_477


def test_a_layer_that_stands_twice_is_replaced_by_the_same_pair_twice():
    layer = nn.Linear(16, 16)
    net = nn.Sequential(layer, nn.ReLU(), nn.ModuleDict({"again": layer}))
    factorize(net, 2)
    assert net[0] is net[2]["again"]
    assert isinstance(net[0], LowRankPair)
    assert len(list(net.parameters())) == 3
    merge(net)
    assert net[0] is net[2]["again"]
    assert isinstance(net[0], nn.Linear)


def test_tied_weights_stay_tied():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(50, 16)
            self.body = nn.Linear(16, 16)
            self.head = nn.Linear(16, 50, bias=False)
            self.head.weight = self.embedding.weight

    net = factorize(Model(), 2)
    assert names(net) == ["body"]
    assert net.head.weight is net.embedding.weight


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # torch's own use of it
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("enable_nested_tensor", [False, True])
def test_the_fast_path_of_transformer_encoders_computes_the_same(norm_first, enable_nested_tensor):
    if norm_first and enable_nested_tensor:
        pytest.skip("torch has no such path")
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=norm_first)
    net = nn.TransformerEncoder(layer, 2, enable_nested_tensor=enable_nested_tensor)
    factorize(net, 4)
    assert names(net) == [f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)]
    inputs = torch.randn(3, 5, 16)
    mask = torch.tensor([[False] * 5, [False] * 4 + [True], [False] * 3 + [True] * 2])
    net.eval()
    expected = net(inputs, src_key_padding_mask=mask)  # gradients: the slow path
    with torch.no_grad():
        fast = net(inputs, src_key_padding_mask=mask)
    torch.testing.assert_close(fast[~mask], expected[~mask], rtol=0, atol=1e-5)
    merge(net)
    with torch.no_grad():
        merged = net(inputs, src_key_padding_mask=mask)
    torch.testing.assert_close(merged[~mask], expected[~mask], rtol=0, atol=1e-5)


def test_attention_goes_on_working():
    net = nn.MultiheadAttention(16, 2)
    expected = copy.deepcopy(net)
    factorize(net, 2)
    x = torch.randn(5, 3, 16)
    assert torch.equal(net(x, x, x)[0], expected(x, x, x)[0])


def test_code_that_reads_the_weight_goes_on_working():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = low_rank(nn.Linear(16, 16), 2)

        def forward(self, x):
            return F.linear(x, self.fc.weight, self.fc.bias)

    net, inputs = Reads(), torch.randn(3, 16)
    expected = net(inputs)
    factorize(net, 2)
    found = net(inputs)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    found.sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_an_lstm_a_gru_and_a_decoder_go_on_working():
    net = nn.ModuleDict(
        {
            "lstm": nn.LSTM(8, 8, batch_first=True),
            "gru": nn.GRUCell(8, 8),
            "decoder": nn.TransformerDecoderLayer(8, 2, 32, batch_first=True),
        }
    )
    factorize(net, 2)
    assert names(net) == ["decoder.linear1", "decoder.linear2"]
    x = torch.randn(2, 3, 8)
    assert net["decoder"](net["lstm"](x)[0], x).shape == x.shape


def test_no_random_number_is_drawn():
    net = nn.Sequential(nn.Linear(512, 512), nn.Conv2d(16, 16, 3))
    before = torch.get_rng_state()
    factorize(net, 8)
    assert torch.equal(before, torch.get_rng_state())


def test_gradients_flow_and_the_pair_learns():
    net = factorize(nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(72, 4)), 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    images, labels = torch.randn(16, 4, 5, 5), torch.arange(16) % 4
    losses = []
    for _ in range(60):
        loss = F.cross_entropy(net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2


def test_what_is_left_is_said(caplog):
    net = nn.Sequential(nn.Linear(16, 16), nn.Conv2d(4, 4, 3, groups=4), nn.Linear(16, 16))
    with caplog.at_level(logging.WARNING, logger="slimnets"):
        factorize(net, 2, exclude="2")
    assert caplog.messages == ["factorize left 1 of 3 layers: '1' (it is grouped (groups=4))"]


def test_nothing_is_said_when_all_went_as_asked(caplog):
    factorize(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), {"0": 2})
    assert caplog.messages == []


def test_a_layer_that_begins_with_zeros_can_be_trained():
    network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    nn.init.zeros_(network[2].weight)
    factorize(network, {"2": 4})
    images = torch.randn(5, 8)
    torch.testing.assert_close(network(images), network[2].second.bias.expand(5, 8))
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (network(images) - images).square().mean().backward()
        optimizer.step()
    assert all(parameter.grad.any() for parameter in network.parameters())


@pytest.mark.parametrize(("activation", "number"), [("relu", 1), ("gelu", 2), (F.silu, 0)])
def test_the_fast_path_that_multiplies_by_the_weights_itself_is_left(activation, number):
    layer = nn.TransformerEncoderLayer(16, 4, 64, activation=activation, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        factorize(layer, 4)
        assert layer.activation_relu_or_gelu == 0
        pairs = layer(x)
        merge(layer)
        assert layer.activation_relu_or_gelu == number
        torch.testing.assert_close(layer(x), pairs, atol=1e-5, rtol=1e-5)
