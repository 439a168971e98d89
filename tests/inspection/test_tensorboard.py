"""What TensorBoard reads back from a run's folder, and that no picture costs a run."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from slimnets.inspection.tensorboard import log_masks, log_summary, log_weights, mask_image

MakeTrainer = Callable[..., L.Trainer]


class Run:
    """A trainer that has been fitted, its network and what its log folder holds."""

    def __init__(self, make_trainer: MakeTrainer, tmp_path: Path, **arguments: Any) -> None:
        self.logger = TensorBoardLogger(tmp_path)
        self.csv = CSVLogger(tmp_path)
        self.module = BoringModel()
        self.trainer = make_trainer(
            logger=[self.logger, self.csv],
            max_steps=2,
            limit_val_batches=0,
            log_every_n_steps=1,
            **arguments,
        )
        self.trainer.fit(self.module)

    def events(self) -> EventAccumulator:
        self.logger.experiment.flush()
        events = EventAccumulator(self.logger.log_dir, size_guidance={"images": 0, "histograms": 0})
        return events.Reload()


@pytest.fixture
def run(make_trainer: MakeTrainer, tmp_path: Path) -> Run:
    return Run(make_trainer, tmp_path)


def test_a_mask_is_dark_where_weights_are_kept(run: Run) -> None:
    mask = torch.eye(4, dtype=torch.bool).reshape(4, 1, 2, 2)
    log_masks(run.trainer, {"layer.weight": mask})
    (event,) = run.events().Images("mask/layer.weight")
    assert event.step == 2
    pixels = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)).convert("L"))
    assert pixels.shape == (512, 512)
    assert np.array_equal(pixels[64::128, 64::128], 224 * (1 - np.eye(4)))


@pytest.mark.parametrize(
    ("shape", "drawn", "size"),
    [
        ((9, 2, 3, 3), (9 * 28, 18 * 28), (9 * 28, 18 * 28)),
        ((512, 512, 3, 3), (512, 512), (512, 512)),
        ((16, 100_000), (128, 512), (128, 512)),
        ((1000, 10), (512, 10), (512, 512)),
        ((7,), (128, 511), (128, 511)),
        ((1, 1), (512, 512), (512, 512)),
    ],
)
def test_pictures_have_a_sensible_size(
    shape: tuple[int, ...], drawn: tuple[int, int], size: tuple[int, int]
) -> None:
    picture = mask_image(torch.ones(shape, dtype=torch.bool))
    assert picture.dtype == torch.uint8
    assert picture.shape == (1, *size)
    assert (picture[0, : drawn[0], : drawn[1]] == 0).all()
    assert (picture[0, :, drawn[1] :] == 255).all()


def test_a_shrunken_picture_shows_how_many_weights_are_kept() -> None:
    mask = torch.zeros(2048, 2048, dtype=torch.bool)
    mask[:1024, ::4] = True
    picture = mask_image(mask)[0]
    assert picture[:256].unique().tolist() == [round(224 * (1 - 0.25**0.5))]
    assert picture[256:].unique().tolist() == [224]


def test_histograms_hold_the_surviving_weights(run: Run) -> None:
    run.module.layer.weight.data[0] = 0
    run.module.layer.weight.data[1, 0] = torch.nan
    log_weights(run.trainer, run.module, ["layer.weight", "layer.bias"])
    events = run.events()
    (weights,) = events.Histograms("weights/layer.weight")
    assert weights.histogram_value.num == 31
    assert events.Histograms("weights/layer.bias")[0].histogram_value.num == 2


def test_a_layer_without_survivors_has_no_histogram(run: Run) -> None:
    run.module.layer.weight.data.zero_()
    log_weights(run.trainer, run.module, ["layer.weight"])
    assert run.events().Tags()["histograms"] == []


def test_the_summary_is_a_table_and_its_totals_go_to_every_logger(run: Run) -> None:
    run.module.layer.weight.data[0] = 0
    log_summary(run.trainer)
    events = run.events()
    (table,) = events.Tensors("summary/text_summary")
    assert "| layer | Linear | 64 | 32 | 50.0% |" in table.tensor_proto.string_val[0].decode()
    assert events.Scalars("summary/sparsity")[0].value == 0.5
    assert events.Scalars("summary/nonzeros")[0].value == 32
    run.csv.save()
    assert "summary/nonzeros" in (Path(run.csv.log_dir) / "metrics.csv").read_text()


def test_the_summary_measures_the_example_of_the_module(run: Run) -> None:
    run.module.example_input_array = torch.randn(3, 32)
    log_summary(run.trainer)
    assert run.events().Scalars("summary/macs")[0].value == 3 * 64


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true", "bf16-mixed"])
def test_the_summary_runs_the_example_in_the_precision_of_the_weights(
    make_trainer: MakeTrainer, tmp_path: Path, precision: Any
) -> None:
    run = Run(make_trainer, tmp_path, precision=precision)
    run.module.layer.weight.data[0] = 0
    run.module.example_input_array = torch.randn(3, 32)
    log_summary(run.trainer)
    events = run.events()
    assert events.Scalars("summary/macs")[0].value == 3 * 64
    assert events.Scalars("summary/effective_macs")[0].value == 3 * 32
    assert torch.get_default_dtype() == torch.float32


def test_an_example_that_does_not_fit_costs_no_more_than_what_is_measured_of_it(run: Run) -> None:
    run.module.example_input_array = torch.randn(3, 5)
    with pytest.warns(UserWarning, match="no latency: the forward pass of example_input_array"):
        log_summary(run.trainer)
    events = run.events()
    assert events.Scalars("summary/weights")[0].value == 64
    assert "summary/macs" not in events.Tags()["scalars"]


def write_all(trainer: L.Trainer, network: nn.Module) -> None:
    log_masks(trainer, {"layer.weight": torch.ones(2, 32, dtype=torch.bool)})
    log_weights(trainer, network, ["layer.weight"])
    log_summary(trainer)


@pytest.mark.parametrize("logger", [False, "csv"])
def test_other_loggers_are_left_alone(
    make_trainer: MakeTrainer, tmp_path: Path, logger: Any
) -> None:
    logger = CSVLogger(tmp_path) if logger else False
    module = BoringModel()
    trainer = make_trainer(logger=logger, max_steps=1, limit_val_batches=0)
    trainer.fit(module)
    write_all(trainer, module)
    assert not list(tmp_path.rglob("events*"))


def log_summary_of_a_lazy_layer(run: Run) -> None:
    run.module.layer = nn.LazyLinear(2)
    log_summary(run.trainer)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda run: log_masks(run.trainer, {"a": None}), "log_masks wrote nothing"),
        (lambda run: log_weights(run.trainer, run.module, ["gone.weight"]), "log_weights wrote"),
        (log_summary_of_a_lazy_layer, "log_summary .* no values yet"),
    ],
)
def test_what_goes_wrong_is_a_warning(run: Run, write: Callable[[Run], None], message: str) -> None:
    with pytest.warns(UserWarning, match=message):
        write(run)
