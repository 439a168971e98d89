"""Exported files, run in the runtimes they are for."""

import resource
import sys

import pytest
import torch
from torch import fx, nn

from slimnets.acceleration.export import export, simplified


def network() -> nn.Module:
    """Channels 1, 2 of the first convolution are silent, 3 is unread; the linear layer flattens."""
    layers = (
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3, padding=1),
        nn.ReLU6(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(6 * 16, 5),
    )
    with torch.no_grad():
        nn.init.uniform_(layers[1].running_var, 0.5, 2.0)
        layers[0].weight[1:3] = 0.0
        layers[0].bias[1:3] = 0.0
        layers[1].running_mean[1:3] = torch.tensor([0.5, -0.5])  # -0.5 is cut off by ReLU
        layers[3].weight[:, 3] = 0.0
        layers[3].weight[4] = 0.0
        layers[3].bias[4] = 2.0
    return nn.Sequential(*layers).eval()


def test_silent_and_unread_channels_are_removed():
    model, x = network(), torch.randn(3, 3, 8, 8)
    small = simplified(model, (x,))
    with torch.no_grad():
        torch.testing.assert_close(small(x), model(x), rtol=1e-5, atol=1e-5)
    convolutions = [m for m in small.modules() if isinstance(m, nn.Conv2d)]
    # channel 2 is the positive constant 0.5, which zero padding cuts at the border: it stays
    assert [len(m.weight) for m in convolutions] == [6, 5]
    assert not [m for m in small.modules() if isinstance(m, nn.BatchNorm2d)]


@pytest.mark.parametrize("batch", [1, 4])
def test_pt2(tmp_path, batch):
    model = network()
    path = export(model, torch.randn(batch, 3, 8, 8), tmp_path / "net.pt2")
    loaded = torch.export.load(path).module()
    for n in (1, 5):
        x = torch.randn(n, 3, 8, 8)
        with torch.no_grad():
            torch.testing.assert_close(loaded(x), model(x), rtol=1e-4, atol=1e-5)


class Shifted(nn.Module):
    def forward(self, x, shift):
        return x + shift


@pytest.mark.parametrize("batch", [2, 4])
def test_an_input_of_length_one_beside_a_batch_stays_that(tmp_path, batch):
    shift = torch.randn(1, 5, 8)
    path = export(Shifted(), (torch.randn(batch, 5, 8), shift), tmp_path / "net.pt2")
    loaded = torch.export.load(path).module()
    for n in (1, batch, 7):
        x = torch.randn(n, 5, 8)
        torch.testing.assert_close(loaded(x, shift), x + shift)


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x, *others, scale=2.0):
        return self.a(x) + self.b(others[0]) * scale


def test_arguments_of_any_number(tmp_path):
    model, inputs = Sum().eval(), (torch.randn(2, 8), torch.randn(2, 8))
    loaded = torch.export.load(export(model, inputs, tmp_path / "net.pt2")).module()
    for n in (1, 5):
        inputs = torch.randn(n, 8), torch.randn(n, 8)
        torch.testing.assert_close(loaded(*inputs), model(*inputs))


class OneByOne(nn.Module):
    def forward(self, x):
        return torch.stack([one.amax(0) for one in x])


class Small(nn.Module):
    def forward(self, x):
        return x.tanh() if x.shape[0] < 4 else x


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
@pytest.mark.parametrize(
    ("model", "limit"), [(OneByOne(), "is always 5"), (Small(), "is at least 4"), (Shifted(), "")]
)
def test_a_batch_that_is_not_free_is_said_and_written(tmp_path, caplog, suffix, model, limit):
    x = torch.randn(5, 3, 8)
    inputs = (x, x) if isinstance(model, Shifted) else (x,)
    path = export(model, inputs, tmp_path / f"net{suffix}")
    found = [message for message in caplog.messages if message.startswith("export")]
    assert found == (
        [f"export: the batch of 'x' {limit}, as the network is written"] if limit else []
    )
    if suffix == ".onnx" and limit == "is always 5":
        session = pytest.importorskip("onnxruntime").InferenceSession(path)
        assert session.get_inputs()[0].shape == [5, 3, 8]
        with pytest.raises(Exception, match="invalid dimensions"):
            session.run(None, {"x": torch.randn(7, 3, 8).numpy()})


def test_onnx_in_both_runtimes(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    model = network()
    path = export(model, torch.randn(1, 3, 8, 8), tmp_path / "net.onnx")
    onnx.checker.check_model(str(path))
    x = torch.randn(5, 3, 8, 8)
    with torch.no_grad():
        expected = model(x)
    for run in (_onnx_runtime, _openvino):
        found = run(path, x)
        if found is not None:
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def _onnx_runtime(path, x):
    try:
        import onnxruntime
    except ImportError:
        return None
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def _openvino(path, x):
    try:
        import openvino
    except ImportError:
        return None
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(path, "CPU", exact)
    return torch.from_numpy(compiled(x.numpy())[0])


@pytest.mark.filterwarnings("ignore")  # executorch's use of what torch and Python deprecate
def test_pte(tmp_path):
    pytest.importorskip("executorch")
    from executorch.runtime import Runtime

    model = network()
    path = export(model, torch.randn(4, 3, 8, 8), tmp_path / "net.pte")
    method = Runtime.get().load_program(path).load_method("forward")
    for n in (1, 4):
        x = torch.randn(n, 3, 8, 8)
        with torch.no_grad():
            torch.testing.assert_close(method.execute([x])[0], model(x), rtol=1e-4, atol=1e-5)


def test_a_missing_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "executorch", None)
    with pytest.raises(ImportError, match="executorch: pip install executorch"):
        export(network(), torch.randn(1, 3, 8, 8), tmp_path / "net.pte")


def test_another_suffix(tmp_path):
    with pytest.raises(ValueError, match=r"net\.bin.*\.pt2, \.onnx, \.pte"):
        export(network(), torch.randn(1, 3, 8, 8), tmp_path / "net.bin")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"path='.*net\.pt2': there is no folder"):
        export(network(), torch.randn(1, 3, 8, 8), tmp_path / "gone" / "net.pt2")


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_a_full_disk_leaves_the_previous_file(tmp_path, suffix):
    if suffix == ".onnx":
        pytest.importorskip("onnxscript")
    path = tmp_path / f"net{suffix}"
    export(nn.Linear(2, 2), torch.randn(2, 2), path)
    previous, before = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises((OSError, RuntimeError)):
            export(nn.Linear(512, 512), torch.randn(2, 512), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == previous
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("batch", [1, 3])
def test_a_vector_as_long_as_the_batch_is_large_changes_with_it(tmp_path, batch):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 4)

        def forward(self, x, scales, shift):
            return self.linear(x) * scales[:, None] + shift

    model, shift = Scaled().eval(), torch.randn(4)
    path = export(model, (torch.randn(batch, 8), torch.randn(batch), shift), tmp_path / "net.pt2")
    loaded = torch.export.load(path).module()
    inputs = torch.randn(5, 8), torch.randn(5), shift
    torch.testing.assert_close(loaded(*inputs), model(*inputs), rtol=1e-5, atol=1e-5)


def test_a_linear_layer_on_the_width_reads_no_channels():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Linear(8, 5)).eval()
    with torch.no_grad():
        model[0].weight[1], model[0].bias[1] = 0.0, 0.0
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(simplified(model, (x,))(x), model(x))


def test_an_image_without_a_batch_keeps_its_channels():
    layers = (nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Flatten(1), nn.Linear(64, 3))
    model, x = nn.Sequential(*layers).eval(), torch.randn(2, 8, 8)
    with torch.no_grad():
        model[0].weight[1] = 0.0
    small = simplified(model, (x,))
    assert isinstance(small, fx.GraphModule)  # not the network itself, for want of a right graph
    torch.testing.assert_close(small(x), model(x))


class Running(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("state", torch.zeros(1, 4))

    def forward(self, x):
        self.state.mul_(0.5).add_(self.layer(x).mean(0, keepdim=True))
        return self.state.clone()


def test_a_state_begins_where_the_network_stands(tmp_path):
    network, x = Running().eval(), torch.randn(3, 4)
    program = torch.export.load(export(network, x, tmp_path / "net.pt2"))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), network(x))


class Centred(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        x -= 0.5
        return self.layer(x)


class Gathers(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, inputs, images, scale):
        parts, (bias, _) = inputs["parts"], inputs["more"]
        return self.layer(parts) * scale + bias + sum(image.mean() for image in images)


@pytest.mark.parametrize("batch", [1, 3])
def test_arguments_in_containers(tmp_path, batch):
    def arguments(batch):
        inputs = {"parts": torch.randn(batch, 4), "more": (torch.randn(batch, 3), None)}
        return inputs, [torch.randn(1, 5, 5), torch.randn(1, 4, 4)], 2.0

    network = Gathers()
    path = export(network, arguments(batch), tmp_path / "network.pt2")
    loaded = torch.export.load(path).module()
    for size in (batch, 5):
        inputs = arguments(size)
        torch.testing.assert_close(loaded(*inputs), network(*inputs))


def test_the_example_is_left_as_it_was(tmp_path):
    x = torch.randn(3, 4)
    before = x.clone()
    program = torch.export.load(export(Centred().eval(), x, tmp_path / "net.pt2"))
    assert torch.equal(x, before)
    assert program.module()(x).shape == (3, 4)
