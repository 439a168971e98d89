import copy
import pickle

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, Timer

from slimnets import GradualPrune, after_target
from tests.support import Worse, small_data


def fit(make_trainer, *callbacks, epochs=5):
    prune = GradualPrune(0.9, end=0.6)
    trainer = make_trainer(
        max_epochs=epochs, callbacks=[prune, *callbacks], enable_checkpointing=True
    )
    module = Worse()
    trainer.fit(module, small_data(), small_data(8))
    return trainer, module


def sparsity(path):
    weight = torch.load(path)["state_dict"]["network.7.weight"]
    return float((weight == 0).float().mean())


def test_the_best_checkpoint_is_of_a_network_that_reached_the_target(make_trainer, tmp_path):
    best = after_target(ModelCheckpoint(tmp_path / "best", monitor="loss"))
    plain = ModelCheckpoint(tmp_path / "plain", monitor="loss", save_weights_only=True)
    fit(make_trainer, plain)
    trainer, _ = fit(make_trainer, best)
    assert sparsity(best.best_model_path) == pytest.approx(0.9, abs=1e-4)
    assert sparsity(plain.best_model_path) < 0.9  # what happens without
    assert trainer.test(Worse(), small_data(8), ckpt_path=best.best_model_path, verbose=False)


def test_early_stopping_waits_for_the_target(make_trainer):
    held, _ = fit(make_trainer, after_target(EarlyStopping("loss", patience=1)), epochs=10)
    assert held.current_epoch == 7  # reached at the end of the 6th, and one of patience


def test_early_stopping_without_it_stops_before(make_trainer):
    with pytest.warns(UserWarning, match="before pruning ends"):
        plain, _ = fit(make_trainer, EarlyStopping("loss", patience=1), epochs=10)
    assert plain.current_epoch == 2


def test_checkpoints_every_few_steps_wait_too(make_trainer, tmp_path):
    every = after_target(ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1))
    fit(make_trainer, every)
    assert {sparsity(path) > 0.899 for path in tmp_path.glob("*.ckpt")} == {True}


def test_other_callbacks_are_refused():
    with pytest.raises(TypeError, match="expected a ModelCheckpoint or an EarlyStopping"):
        after_target(Timer())


def test_the_last_checkpoint_waits_too(make_trainer, tmp_path):
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step >= 6

    last = after_target(ModelCheckpoint(tmp_path, save_last=True, monitor="loss"))
    with pytest.warns(UserWarning, match="before pruning ends"):
        fit(make_trainer, last, Stop())
    assert not list(tmp_path.glob("*.ckpt"))


def test_a_held_callback_keeps_its_kind_its_key_and_can_be_copied():
    plain = ModelCheckpoint(monitor="loss")
    held = after_target(ModelCheckpoint(monitor="loss"))
    assert after_target(held) is held
    assert held.state_key == plain.state_key
    for copied in (copy.deepcopy(held), pickle.loads(pickle.dumps(held))):
        assert isinstance(copied, ModelCheckpoint)
        assert type(copied).__mro__[1:] == type(held).__mro__[1:]
        assert copied.monitor == "loss"
