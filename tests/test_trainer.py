"""What remaining_steps predicts is what the Trainer then does."""

import math

import lightning as L
import pytest
from lightning.pytorch.callbacks import (
    GradientAccumulationScheduler,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from torch.utils.data import DataLoader

from slimnets.trainer import remaining_steps
from tests.support import Classifier, Endless, small_data


class Predict(L.Callback):
    def on_train_start(self, trainer, pl_module):
        self.predicted = trainer.global_step + remaining_steps(trainer)


@pytest.mark.parametrize(
    ("arguments", "callbacks"),
    [
        ({"max_epochs": 3}, ()),
        ({"max_epochs": 3, "accumulate_grad_batches": 4}, ()),
        ({"max_epochs": 5, "accumulate_grad_batches": 7}, ()),
        ({"max_epochs": 4}, [GradientAccumulationScheduler({0: 2, 2: 3, 3: 1})]),
        ({"max_epochs": 4, "max_steps": 9}, ()),
        ({"max_epochs": -1, "max_steps": 9}, ()),
        ({"max_epochs": 2, "limit_train_batches": 0.5}, ()),
        ({"max_epochs": 2, "overfit_batches": 2}, ()),
        ({"fast_dev_run": 3}, ()),
    ],
)
def test_the_length_of_a_run(make_trainer, arguments, callbacks):
    predict = Predict()
    trainer = make_trainer(callbacks=[*callbacks, predict], **arguments)
    trainer.fit(Classifier(), small_data(), small_data(8))
    assert trainer.global_step == predict.predicted


def test_the_epoch_that_swa_adds_for_batch_norm_is_not_counted(make_trainer):
    predict = Predict()
    swa = StochasticWeightAveraging(0.01, swa_epoch_start=2)
    trainer = make_trainer(max_epochs=4, callbacks=[swa, predict])
    trainer.fit(Classifier(), small_data(), small_data(8))
    assert predict.predicted == 4 * 6
    assert trainer.current_epoch == 5


def test_a_loader_without_length_has_no_length(make_trainer):
    predict = Predict()
    trainer = make_trainer(max_epochs=1, callbacks=[predict, Stop()])
    trainer.fit(Classifier(), DataLoader(Endless(), batch_size=2), small_data(8))
    assert predict.predicted == float("inf")


class Stop(L.Callback):
    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = True


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("steps", [3, 6, 7])
def test_a_resumed_run_from_an_epoch_or_its_middle(make_trainer, tmp_path, steps):
    trainer = make_trainer(max_epochs=3, max_steps=steps)
    trainer.fit(Classifier(), small_data(), small_data(8))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    predict = Predict()
    trainer = make_trainer(max_epochs=3, callbacks=[predict])
    trainer.fit(Classifier(), small_data(), small_data(8), ckpt_path=tmp_path / "x.ckpt")
    assert trainer.global_step == predict.predicted


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize(
    ("steps", "accumulated"), [(2, 1), (6, 1), (8, 1), (12, 1), (1, 3), (2, 3)]
)
def test_from_a_checkpoint_that_is_saved_when_a_batch_ends(
    make_trainer, tmp_path, steps, accumulated
):
    """Three of them after the last of an epoch's six batches."""
    save = ModelCheckpoint(tmp_path, filename="saved", every_n_train_steps=steps, save_top_k=-1)
    begun = make_trainer(
        max_epochs=math.ceil(steps * accumulated / 6),
        accumulate_grad_batches=accumulated,
        callbacks=[save],
        enable_checkpointing=True,
    )
    begun.fit(Classifier(), small_data(), small_data(8))
    predict = Predict()
    trainer = make_trainer(max_epochs=4, accumulate_grad_batches=accumulated, callbacks=[predict])
    trainer.fit(Classifier(), small_data(), small_data(8), ckpt_path=tmp_path / "saved.ckpt")
    assert trainer.global_step == predict.predicted
