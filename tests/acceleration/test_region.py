"""Every step of the engine against PyTorch, over fuzzed shapes."""

import copy
import pickle
import threading

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch.nn import functional as F

pytest.importorskip("numba", reason="the engine is compiled by numba")

from slimnets.acceleration import codes
from slimnets.acceleration.build import build
from slimnets.acceleration.fold import fold_batch_norm
from slimnets.acceleration.nodes import Recorder
from slimnets.acceleration.partition import annotate, cut
from slimnets.acceleration.region import SHAPES_KEPT, Region
from slimnets.acceleration.steps import Pool, Shape
from slimnets.acceleration.trace import trace
from slimnets.acceleration.weights import Matrix

FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
TOLERANCE = 1e-5
CONVOLUTIONS = {
    "kernel": st.tuples(st.integers(1, 4), st.integers(1, 4)),
    "stride": st.tuples(st.integers(1, 3), st.integers(1, 3)),
    "padding": st.tuples(st.integers(0, 3), st.integers(0, 3)),
    "dilation": st.tuples(st.integers(1, 2), st.integers(1, 2)),
    "image": st.tuples(st.integers(1, 20), st.integers(1, 20)),
    "batch": st.sampled_from([1, 2, 3, 7, 16, 21]),
}


def in_engine(model: nn.Module, x: torch.Tensor) -> tuple[fx.GraphModule, list[Region]]:
    """``model`` with all that the engine knows computed by it."""
    graph = trace(model.eval(), 1)
    assert graph is not None
    Recorder(graph).run(x)
    fold_batch_norm(graph)
    Recorder(graph).run(x)
    return graph, list(cut(graph, annotate(graph)).values())


def assert_equal(model: nn.Module, x: torch.Tensor, regions: int = 1) -> None:
    with torch.no_grad():
        expected = model.eval()(x)
        graph, found = in_engine(model, x)
        assert len(found) == regions
        result = graph(x)
    for region in found:
        assert None not in region.plans.values(), "the engine gave up"
    assert result.shape == expected.shape
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(result, expected, rtol=0, atol=TOLERANCE * scale)


def thin(layer: nn.Module, density: float) -> nn.Module:
    with torch.no_grad():
        layer.weight.mul_(torch.rand_like(layer.weight) < density)
    return layer


@FUZZ
@given(
    groups=st.sampled_from([1, 1, 2, 3]),
    channels=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    **CONVOLUTIONS,
    density=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    bias=st.booleans(),
)
def test_convolution(
    groups, channels, kernel, stride, padding, dilation, image, batch, density, bias
):
    for i in range(2):
        assume(image[i] + 2 * padding[i] >= dilation[i] * (kernel[i] - 1) + 1)
    inputs, outputs = (groups * c for c in channels)
    layer = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, groups, bias)
    assert_equal(thin(layer, density), torch.randn(batch, inputs, *image))


@FUZZ
@given(
    channels=st.tuples(st.integers(1, 40), st.sampled_from([16, 17, 31, 32, 33, 48, 70])),
    **CONVOLUTIONS,
    density=st.sampled_from([0.6, 1.0]),
)
def test_dense_convolution(channels, kernel, stride, padding, dilation, image, batch, density):
    for i in range(2):
        assume(image[i] + 2 * padding[i] >= dilation[i] * (kernel[i] - 1) + 1)
    layer = nn.Conv2d(*channels, kernel, stride, padding, dilation)
    assert_equal(thin(layer, density), torch.randn(batch, channels[0], *image))


@pytest.mark.parametrize("batch", [1, 16])
def test_dense_convolutions_of_several_blocks_with_a_residual(batch):
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(40, 700, 3, padding=1)
            self.second = nn.Conv2d(700, 40, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.relu(x + self.second(F.relu(self.first(x))))

    model, x = Residual(), torch.randn(batch, 40, 6, 6)
    assert_equal(model, x)
    graph, (region,) = in_engine(model, x)
    graph(x)
    (plan,) = region.plans.values()
    table = plan.table(batch)
    assert max(table.ops[table.ops[:, codes.CODE] == codes.DENSE, codes.BLOCKS]) > 1
    assert table.scratch < 2 * 700 * 36 * batch  # sums of one layer, some of them twice


def test_vectors_of_weights_stay_within_cache_lines():
    matrix = Matrix.of(torch.randn(70, 13, 3, 3).numpy())
    for one in (matrix, copy.deepcopy(matrix), pickle.loads(pickle.dumps(matrix))):
        assert one.values.ctypes.data % 64 == 0
        assert (one.values == matrix.values).all()


def test_not_a_number_passes_through_a_dense_layer():
    layer, x = nn.Conv2d(16, 32, 3, padding=1), torch.randn(1, 16, 9, 9)
    x[0, 3, 4, 4], x[0, 5, 1, 1] = torch.nan, torch.inf
    with torch.no_grad():
        expected, found = layer(x), in_engine(layer, x)[0](x)
    torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # torch's advice
@pytest.mark.parametrize("kernel", [(3, 3), (2, 4), (1, 5)])
def test_same_padding(kernel):
    layer = thin(nn.Conv2d(5, 7, kernel, padding="same", dilation=(1, 2)), 0.3)
    assert_equal(layer, torch.randn(3, 5, 9, 11))


def test_depthwise_then_pointwise_with_empty_and_full_rows():
    deep = nn.Conv2d(12, 12, 3, padding=1, groups=12)
    wide = thin(nn.Conv2d(12, 20, 1), 0.1)
    with torch.no_grad():
        deep.weight[3] = 0.0
        wide.weight[4], wide.weight[5] = 0.0, 1.0
    network = nn.Sequential(deep, nn.ReLU6(), wide)
    assert_equal(network, torch.randn(5, 12, 10, 10))


@FUZZ
@given(
    features=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    lead=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    density=st.sampled_from([0.0, 0.1, 1.0]),
)
def test_linear(features, lead, density):
    assert_equal(thin(nn.Linear(*features), density), torch.randn(*lead, features[0]))


@FUZZ
@given(
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    image=st.tuples(st.integers(4, 17), st.integers(4, 17)),
    batch=st.sampled_from([1, 2, 5]),
    kind=st.sampled_from(["max", "max ceil", "average", "global", "global max"]),
    data=st.data(),
)
def test_pooling(kernel, stride, image, batch, kind, data):
    padding = tuple(data.draw(st.integers(0, k // 2)) for k in kernel)
    pool: nn.Module = nn.AdaptiveMaxPool2d(1) if kind == "global max" else nn.AdaptiveAvgPool2d(1)
    if kind.startswith("max"):
        pool = nn.MaxPool2d(kernel, stride, padding, ceil_mode=kind.endswith("ceil"))
    elif kind == "average":
        pool = nn.AvgPool2d(kernel, stride, padding)
    network = nn.Sequential(thin(nn.Conv2d(3, 5, 3, padding=1), 0.3), pool, nn.ReLU())
    assert_equal(network, torch.randn(batch, 3, *image))


def two_crops(y):
    return F.pad(y, (-1, 0)) + F.pad(y, (0, -1))


PADS, CROPS, ANY = (st.tuples(*[st.integers(*to)] * 4) for to in ((0, 3), (-2, 0), (-2, 3)))


class PaddedByHand(nn.Module):
    def __init__(self, stride, padding, pads, calls) -> None:
        super().__init__()
        self.a, self.b = thin(nn.Conv2d(3, 5, 3, padding=1), 0.3), thin(nn.Conv2d(5, 4, 2), 0.3)
        self.a.stride = self.b.stride = stride
        self.b.padding = padding
        self.pads, self.calls = pads, calls

    def forward(self, x):
        y = self.a(x)
        for pad, call in zip(self.pads, self.calls, strict=True):
            y = call(F.pad(y, pad))
        return self.b(y) + self.b(y)


@FUZZ
@given(
    stride=CONVOLUTIONS["stride"],
    padding=st.tuples(st.integers(0, 1), st.integers(0, 1)),
    pads=st.tuples(*[st.one_of(CROPS, PADS, ANY)] * 2),
    calls=st.tuples(*[st.sampled_from([F.relu, lambda y: y.contiguous(), two_crops])] * 2),
    batch=CONVOLUTIONS["batch"],
)
def test_padding_and_cropping_by_hand(stride, padding, pads, calls, batch):
    assert_equal(PaddedByHand(stride, padding, pads, calls), torch.randn(batch, 3, 31, 30))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("size", [(2, 3), (8, 9), (7, 22), (6, 32), (4, 51), (5, 75)])
def test_halving(size, batch):
    network = nn.Sequential(thin(nn.Conv2d(3, 5, 3, padding=1), 0.3), nn.ReLU6(), nn.MaxPool2d(2))
    assert_equal(network, 6 * torch.randn(batch, 3, *size))


@pytest.mark.parametrize(
    ("places", "how"),
    [
        ({}, codes.HALVE),
        ({"maximum": False}, codes.SUM),
        ({"stride": (2, 1)}, codes.LARGEST),
        ({"padding": (0, 1)}, codes.LARGEST),
        ({"dilation": (2, 1)}, codes.LARGEST),
        ({"ceil": True}, codes.LARGEST),  # the last row is one alone
    ],
)
def test_only_whole_pairs_of_rows_and_columns_are_halved(places, how):
    step = Pool([0], 1, **({"kernel": (2, 2), "stride": (2, 2)} | places))
    ops = build([step], [(0, Shape(3, 7, 8))], [1], samples=2).ops
    assert ops[ops[:, codes.CODE] == codes.POOL, codes.POOLING].tolist() == [how]


class Pooled(nn.Module):
    def __init__(self, pool) -> None:
        super().__init__()
        self.layer, self.pool = thin(nn.Conv2d(3, 5, 3, padding=1), 0.3), pool

    def forward(self, x):
        return self.pool(self.layer(x))


@pytest.mark.parametrize("pool", [F.adaptive_max_pool2d, F.adaptive_avg_pool2d])
def test_pooling_to_one_pixel_by_a_function(pool):
    assert_equal(Pooled(lambda x: pool(x, 1)), torch.randn(2, 3, 9, 7))


def test_pooling_with_indices_stays_outside():
    indices = Pooled(nn.AdaptiveMaxPool2d(1, return_indices=True)), torch.randn(2, 3, 9, 7)
    with torch.no_grad():
        graph, _ = in_engine(*indices)
        expected, result = indices[0](indices[1]), graph(indices[1])
    torch.testing.assert_close(result[0], expected[0])
    assert torch.equal(result[1], expected[1])


class Block(nn.Module):
    """A residual block, written as users write it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = thin(nn.Conv2d(6, 8, 3, padding=1, stride=2, bias=False), 0.2)
        self.norm = nn.BatchNorm2d(8)
        self.second = thin(nn.Conv2d(8, 8, 3, padding=1), 0.2)
        self.short = thin(nn.Conv2d(6, 8, 1, stride=2), 0.5)
        self.after = nn.BatchNorm2d(16)
        self.head = thin(nn.Linear(16 * 5 * 5, 4), 0.2)
        for norm in (self.norm, self.after):
            nn.init.uniform_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)

    def forward(self, x):
        y = F.relu(self.norm(self.first(x)), inplace=True)
        y = self.second(y)
        y += self.short(x)
        y = F.max_pool2d(F.relu(y), 2)
        y = self.after(torch.cat([y, y.relu()], 1))
        return self.head(y.reshape(y.size(0), -1))


def test_residual_concatenation_and_a_norm_that_cannot_be_folded():
    assert_equal(Block(), torch.randn(3, 6, 20, 20))


def test_values_that_leave_the_engine_in_the_middle():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = thin(nn.Conv2d(4, 4, 3, padding=1), 0.3), thin(nn.Conv2d(4, 4, 1), 0.5)

        def forward(self, x):
            y = self.a(x)
            return torch.sigmoid(y).sum() + self.b(torch.tanh(y) * y)

    assert_equal(Both(), torch.randn(2, 4, 6, 6), regions=2)


def test_other_batches_and_images_afterwards():
    network = Block()
    with torch.no_grad():
        graph, (region,) = in_engine(network, torch.randn(2, 6, 20, 20))
        for batch, size in ((1, 20), (37, 20), (2, 21), (4, 19)):
            x = torch.randn(batch, 6, size, size)
            torch.testing.assert_close(graph(x), network(x), rtol=1e-4, atol=1e-4)
        assert None not in region.plans.values()
        x = torch.randn(2, 6, 20, 20).to(memory_format=torch.channels_last)
        torch.testing.assert_close(graph(x), network(x), rtol=1e-4, atol=1e-4)
        assert graph(torch.randn(0, 6, 20, 20)).shape == (0, 4)
        with pytest.raises(RuntimeError, match="shapes"):  # PyTorch's own message
            graph(torch.randn(1, 6, 40, 40))


@pytest.mark.parametrize("batch", [1, 2])  # single images are pooled in a way of their own
def test_nan_and_infinities_pass_as_in_pytorch(batch):
    layer = nn.Conv2d(3, 4, 3, padding=1)  # no zero weight: not one product is skipped
    network = nn.Sequential(layer, nn.ReLU(), nn.MaxPool2d(2))
    x = torch.randn(batch, 3, 16, 16)
    x[0, 1, 3, 3], x[-1, 0, 8, 8], x[-1, 2, 0, 0] = torch.nan, torch.inf, -torch.inf
    with torch.no_grad():
        graph, _ = in_engine(network, x)
        torch.testing.assert_close(graph(x), network(x), rtol=1e-4, atol=1e-4, equal_nan=True)
        layer.weight[:, 0] = 0.0
        graph, _ = in_engine(network, x)
        found = graph(x)[-1]
    # the one difference: a weight that is skipped makes no NaN of an infinite input
    assert found[:, 3:6, 3:6].isfinite().all()
    assert network(x)[-1, :, 3:6, 3:6].isnan().any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["depthwise", "average", "linear", "residual"])
def test_they_pass_through_every_step(name, value):
    first = nn.Conv2d(4, 4, 3, padding=1, stride=2, groups=4 if name == "depthwise" else 1)
    then = {
        "depthwise": [nn.ReLU6()],
        "average": [nn.AvgPool2d(2, padding=1), nn.BatchNorm2d(4), nn.ReLU()],
        "linear": [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)],
        "residual": [Residual()],
    }
    network, x = nn.Sequential(first, *then[name]).eval(), torch.randn(3, 4, 12, 12)
    for strange in (x.clone(), x[:, :, ::2, ::2], x.transpose(2, 3)):
        strange[1, 2, 3, 3] = value
        with torch.no_grad():
            graph, found = in_engine(network, x)
            assert found
            expected, result = network(strange), graph(strange)
            assert not expected.isfinite().all() or name == "depthwise"
            torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return torch.cat([F.relu(self.layer(x) + x), x], 1)


def test_several_threads_and_several_callers(request):
    torch.set_num_threads(3)
    request.addfinalizer(lambda: torch.set_num_threads(1))
    wide = [thin(nn.Conv2d(64, 64, 3, padding=1), 0.4) for _ in range(3)]  # several blocks
    network = nn.Sequential(*wide, nn.MaxPool2d(2), thin(nn.Conv2d(64, 64, 3, stride=2), 0.4))
    inputs = [torch.randn(n, 64, 12, 12) for n in (1, 2, 5, 16)]
    with torch.no_grad():
        expected = [network(x) for x in inputs]
        graph, _ = in_engine(network, inputs[0])
        wrong = []

        def call(x, y):
            with torch.no_grad():
                wrong.extend(not torch.allclose(graph(x), y, atol=1e-4) for _ in range(20))

        callers = [
            threading.Thread(target=call, args=pair)
            for pair in zip(inputs * 2, expected * 2, strict=True)
        ]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    assert len(wrong) == 160 and not any(wrong)


def test_sizes_that_change_at_every_call_build_no_tables():
    network = nn.Sequential(thin(nn.Conv2d(3, 5, 3), 0.3), nn.ReLU())
    images = [torch.randn(1, 3, 9 + i, 9) for i in range(3 * SHAPES_KEPT)]
    with torch.no_grad():
        graph, (region,) = in_engine(network, images[0])

        def see(x):
            torch.testing.assert_close(graph(x), network(x), rtol=1e-4, atol=1e-4)
            return set(region.plans)

        for x in images[:SHAPES_KEPT]:
            kept = see(x)
        assert len(kept) == SHAPES_KEPT
        for _ in range(2):  # by its next turn, a size is forgotten
            assert all(see(x) == kept for x in images[SHAPES_KEPT:])
        assert see(images[-1]) - kept == {(tuple(images[-1].shape[1:]),)}  # twice in a row
        assert len(region.plans) == SHAPES_KEPT


def test_pickle_and_deepcopy():
    network, x = Block(), torch.randn(2, 6, 20, 20)
    with torch.no_grad():
        _, (region,) = in_engine(network, x)
        expected = region(x)
        assert torch.equal(pickle.loads(pickle.dumps(region))(x), expected)
        assert torch.equal(copy.deepcopy(region)(x), expected)


def test_the_default_type_and_device_of_the_caller_change_nothing():
    network, x = nn.Sequential(thin(nn.Conv2d(3, 5, 3), 0.3), nn.ReLU()), torch.randn(2, 3, 9, 7)
    with torch.no_grad():
        graph, _ = in_engine(network, x)
        expected = network(x)
        with torch.device("meta"):
            torch.testing.assert_close(graph(x), expected)
        torch.set_default_dtype(torch.float64)
        try:
            torch.testing.assert_close(graph(x), expected)
        finally:
            torch.set_default_dtype(torch.float32)


def test_the_mean_of_a_large_image_is_exact():
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.AdaptiveAvgPool2d(1))
    with torch.no_grad():
        graph, _ = in_engine(network, torch.randn(1, 1, 4, 4))
        for batch in (1, 2):
            x = torch.full((batch, 1, 600, 600), 0.7)
            torch.testing.assert_close(graph(x), network(x), rtol=1e-6, atol=0)


def test_a_minus_that_is_still_to_be_taken():
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3)), torch.randn(2, 3, 8, 8)
    graph, _ = in_engine(model, x)
    with torch.no_grad():
        torch.testing.assert_close(graph(torch._neg_view(x)), model(-x))
