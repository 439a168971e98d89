"""Resuming continues bit for bit."""

import random

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from slimnets import ExactResume, GradualPrune
from slimnets.resume import last_checkpoint
from tests.support import Classifier, small_data, small_network

pytestmark = [  # a resumed run writes elsewhere here, and not always checkpoints
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


class Noisy(Classifier):
    """Draws from every generator that a user's training may draw from."""

    def __init__(self):
        super().__init__(small_network(dropout=0.5), torch.optim.Adam, lr=0.01)

    def training_step(self, batch, batch_idx):
        noise = torch.randn_like(batch[0]) * random.random() + float(np.random.rand())
        return super().training_step((batch[0] + noise, batch[1]), batch_idx)


def callbacks(folder):
    return [
        GradualPrune(0.9, end=0.8),
        ExactResume(),
        ModelCheckpoint(folder, save_top_k=-1, filename="{epoch}"),
    ]


def fit(make_trainer, folder, ckpt_path=None):
    L.seed_everything(1 if ckpt_path is None else 2, verbose=False)
    module = Noisy()
    trainer = make_trainer(max_epochs=5, callbacks=callbacks(folder), enable_checkpointing=True)
    trainer.fit(
        module, small_data(shuffle=True), small_data(8), ckpt_path=ckpt_path, weights_only=True
    )
    return module, trainer


@pytest.mark.parametrize("epoch", [0, 1, 2, 3])
def test_a_run_resumed_from_an_epoch_continues_bit_for_bit(make_trainer, tmp_path, epoch):
    whole, trainer = fit(make_trainer, tmp_path / "whole")
    again, resumed = fit(
        make_trainer, tmp_path / "again", ckpt_path=tmp_path / f"whole/epoch={epoch}.ckpt"
    )
    for (name, a), b in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    optimizers = trainer.optimizers[0].state_dict(), resumed.optimizers[0].state_dict()
    for a, b in zip(*(o["state"].values() for o in optimizers), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)
    first, second = (t.callbacks[0].masks for t in (trainer, resumed))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_without_it_the_run_differs(make_trainer, tmp_path, monkeypatch):
    monkeypatch.setattr(ExactResume, "on_fit_start", lambda *_: None)
    whole, _ = fit(make_trainer, tmp_path / "whole")
    again, _ = fit(make_trainer, tmp_path / "again", tmp_path / "whole/epoch=1.ckpt")
    assert not torch.equal(whole.network[7].weight, again.network[7].weight)


def test_resuming_with_other_arguments_warns_and_keeps_the_zeros(make_trainer, tmp_path):
    fit(make_trainer, tmp_path)
    path = tmp_path / "epoch=3.ckpt"
    trainer = make_trainer(max_epochs=6, callbacks=[GradualPrune(0.95, end=1.0), ExactResume()])
    module = Noisy()
    with (
        pytest.warns(UserWarning, match=r"GradualPrune\(sparsity=0.95\): .*made with sparsity=0.9"),
        pytest.warns(UserWarning, match=r"GradualPrune\(end=1.0\): .*made with end=0.8"),
    ):
        trainer.fit(module, small_data(shuffle=True), small_data(8), ckpt_path=path)
    assert int((module.network[7].weight == 0).sum()) == round(0.95 * 8192)


def test_a_longer_run_goes_on_with_the_span_it_had(make_trainer, tmp_path):
    fit(make_trainer, tmp_path)
    prune = GradualPrune(0.9, end=0.8)
    trainer = make_trainer(max_epochs=20, limit_train_batches=1, callbacks=[prune, ExactResume()])
    trainer.fit(Noisy(), small_data(), small_data(8), ckpt_path=tmp_path / "epoch=2.ckpt")
    assert prune._span.end == 24
    assert prune.target_reached


def test_a_checkpoint_of_more_processes_is_refused(make_trainer, tmp_path):
    resume = ExactResume()
    state = resume.state_dict()
    resume.load_state_dict({"ranks": state["ranks"] * 2})
    with pytest.raises(ValueError, match="the checkpoint is of 2 processes and this run has 1"):
        resume.on_fit_start(make_trainer(), Noisy())


def test_a_checkpoint_cut_off_is_passed_over(make_trainer, tmp_path):
    assert last_checkpoint(tmp_path) is None
    fit(make_trainer, tmp_path)
    newest = last_checkpoint(tmp_path)
    assert newest is not None
    assert newest.name == "epoch=4.ckpt"
    data = newest.read_bytes()
    for size in (0, 1, 100, len(data) // 2, len(data) - 1):
        newest.write_bytes(data[:size])
        found = last_checkpoint(tmp_path)
        assert found is not None
        assert found.name == "epoch=3.ckpt"


def test_zeros_pruned_before_the_checkpoint_stay(make_trainer, tmp_path):
    """Lightning's ModelPruning loses them: 91.2 % zeros become 0.07 %."""
    prune = GradualPrune(0.9, begin=0, end=0, every=1)
    trainer = make_trainer(max_epochs=1, callbacks=[prune])
    trainer.fit(Noisy(), small_data(), small_data(8))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    module = Noisy()
    trainer = make_trainer(max_epochs=3, callbacks=[GradualPrune(0.9, begin=0, end=0, every=1)])
    trainer.fit(module, small_data(), small_data(8), ckpt_path=tmp_path / "x.ckpt")
    zeros = module.network[7].weight == 0
    assert int(zeros.sum()) == round(0.9 * 8192)
    assert torch.equal(zeros, ~prune.masks["network.7.weight"])
