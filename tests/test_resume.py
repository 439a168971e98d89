"""Resuming continues bit for bit."""

import random

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from slimnets import ExactResume, GradualPrune, LowRank
from slimnets.resume import last_checkpoint
from tests.support import Classifier, assert_equal, small_data, small_network

pytestmark = [  # a resumed run writes elsewhere here, and not always checkpoints
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    # torchdata's own use of an API that torch deprecates
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),
]


class Noisy(Classifier):
    """Draws from every generator that a user's training may draw from."""

    def __init__(self):
        super().__init__(small_network(dropout=0.5), torch.optim.Adam, lr=0.01)

    def training_step(self, batch, batch_idx):
        noise = torch.randn_like(batch[0]) * random.random() + float(np.random.rand())
        return super().training_step((batch[0] + noise, batch[1]), batch_idx)


class Cycled(Noisy):
    """Asks in ``configure_optimizers`` for the length of the run, and so for its loader."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        steps = self.trainer.estimated_stepping_batches
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=steps)
        return [optimizer], [{"scheduler": cycle, "interval": "step"}]


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
    assert_equal(again, whole)
    optimizers = trainer.optimizers[0].state_dict(), resumed.optimizers[0].state_dict()
    for a, b in zip(*(o["state"].values() for o in optimizers), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)
    first, second = (t.callbacks[0].masks for t in (trainer, resumed))
    assert all(torch.equal(first[name], second[name]) for name in first)


class Rows(Logger):
    """What was logged, by step."""

    name, version = "rows", 0

    def __init__(self):
        super().__init__()
        self.rows = {}

    def log_metrics(self, metrics, step=None):
        self.rows.setdefault(step, {}).update(metrics)

    def log_hyperparams(self, *_, **__):
        pass


class SaveAfterEveryBatch(L.Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, *_):
        batches = trainer.fit_loop.epoch_loop.batch_progress.total.ready
        trainer.save_checkpoint(self.folder / f"{batches:02}.ckpt")


def fit_from(
    make_trainer,
    save,
    loader=StatefulDataLoader,
    validate=True,
    ckpt_path=None,
    more=None,
    kind=Noisy,
    **given,
):
    """Two epochs of four batches.

    Returns:
        What must be the same, and what was logged.
    """
    L.seed_everything(1 if ckpt_path is None else 2, verbose=False)
    module, rows = kind(), Rows()
    arguments = {"max_epochs": 2, "logger": rows, "log_every_n_steps": 1, **given}
    prune = GradualPrune(0.9, begin=1, end=3, every=1)
    trainer = make_trainer(
        callbacks=[prune, ExactResume(), save, *([more] if more else [])],
        enable_checkpointing=isinstance(save, ModelCheckpoint),
        **arguments,
    )
    data = loader(small_data(32).dataset, batch_size=8, shuffle=True)
    trainer.fit(module, data, small_data(8) if validate else None, ckpt_path=ckpt_path)
    optimizer = trainer.optimizers[0].state_dict()["state"]
    tensors = [*module.state_dict().values(), torch.get_rng_state()]
    tensors += [value for state in optimizer.values() for value in state.values()]
    return tensors, rows.rows


def assert_goes_on_from_each(make_trainer, tmp_path, make_save, **arguments):
    whole, logged = fit_from(make_trainer, make_save(tmp_path / "whole"), **arguments)
    *checkpoints, _ = sorted((tmp_path / "whole").glob("*.ckpt"))  # the last is of the end
    assert checkpoints
    for path in checkpoints:
        again, rows = fit_from(
            make_trainer, make_save(tmp_path / "again"), ckpt_path=path, **arguments
        )
        for a, b in zip(whole, again, strict=True):
            assert torch.equal(a, b), path.name
        if "more" in arguments:
            continue  # Lightning numbers the steps of a resumed log by the accumulation of epoch 0
        begin = min(step for step, row in rows.items() if {"train_loss", "val_loss"} & row.keys())
        for step in (step for step in logged if step > begin):
            for name in ("train_loss", "sparsity", "val_loss", "epoch"):
                assert logged[step].get(name) == rows[step].get(name), (path.name, step, name)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"validate": False},
        {"val_check_interval": 0.5},
        {"accumulate_grad_batches": 3},
        {"more": GradientAccumulationScheduler({0: 1, 1: 3})},
        {"max_steps": 7, "max_epochs": -1},
        {"kind": Cycled},
        {"accumulate_grad_batches": 3, "more": LowRank(4, at=2)},  # replaced before a step is due
    ],
)
def test_a_run_resumed_from_any_batch_continues_bit_for_bit(make_trainer, tmp_path, arguments):
    assert_goes_on_from_each(make_trainer, tmp_path, SaveAfterEveryBatch, **arguments)


@pytest.mark.parametrize("loader", [DataLoader, StatefulDataLoader])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"save_on_train_epoch_end": False},  # at the end of validation
        {"max_steps": 7, "max_epochs": -1},
        {"max_steps": 7, "max_epochs": -1, "validate": False},
        {"kind": Cycled},
    ],
)
def test_any_loader_goes_on_from_the_end_of_an_epoch(make_trainer, tmp_path, loader, arguments):
    def save(folder):
        return ModelCheckpoint(
            folder, save_top_k=-1, filename="{epoch}", save_on_train_epoch_end=at
        )

    arguments = dict(arguments)
    at = arguments.pop("save_on_train_epoch_end", True)
    assert_goes_on_from_each(make_trainer, tmp_path, save, loader=loader, **arguments)


def test_persistent_workers_go_on_from_the_end_of_an_epoch(make_trainer, tmp_path):
    def loader(dataset, **arguments):
        return DataLoader(dataset, num_workers=1, persistent_workers=True, **arguments)

    def save(folder):
        return ModelCheckpoint(
            folder, save_top_k=-1, filename="{epoch}", save_on_train_epoch_end=True
        )

    assert_goes_on_from_each(make_trainer, tmp_path, save, loader=loader)


def test_a_plain_loader_goes_on_where_a_stateful_one_ended_its_epoch(make_trainer, tmp_path):
    save = ModelCheckpoint(tmp_path, filename="{epoch}", save_on_train_epoch_end=True)
    fit_from(make_trainer, save, max_epochs=1)
    with pytest.warns(UserWarning, match="the place of 1 stateful loaders, and this run has 0"):
        _, rows = fit_from(
            make_trainer,
            SaveAfterEveryBatch(tmp_path),
            loader=DataLoader,
            ckpt_path=tmp_path / "epoch=0.ckpt",
        )
    assert max(step for step, row in rows.items() if "train_loss" in row) == 7


def test_another_loader_begins_its_epoch_anew(make_trainer, tmp_path):
    """The limit that the docstring names."""
    saved = SaveAfterEveryBatch(tmp_path)
    whole, _ = fit_from(make_trainer, saved, loader=DataLoader)
    with pytest.warns(UserWarning, match="your dataloader is not resumable"):
        again, _ = fit_from(make_trainer, saved, loader=DataLoader, ckpt_path=tmp_path / "02.ckpt")
    assert not torch.equal(whole[0], again[0])


def test_a_checkpoint_saved_without_it_is_named(make_trainer, tmp_path):
    trainer = make_trainer(max_epochs=1)
    trainer.fit(Classifier(), small_data())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    trainer = make_trainer(max_epochs=2, callbacks=[ExactResume()])
    with pytest.warns(UserWarning, match="saved without ExactResume"):
        trainer.fit(Classifier(), small_data(), ckpt_path=tmp_path / "last.ckpt")


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


def resume_from_the_middle(make_trainer, folder, before, after):
    """Go on with the callbacks ``after`` from the second of four epochs of those ``before``."""
    save = ModelCheckpoint(folder, save_top_k=-1, filename="{epoch}")
    trainer = make_trainer(max_epochs=4, callbacks=[*before, save], enable_checkpointing=True)
    trainer.fit(Noisy(), small_data(), small_data(8))
    trainer = make_trainer(max_epochs=4, callbacks=after)
    trainer.fit(Noisy(), small_data(), small_data(8), ckpt_path=folder / "epoch=1.ckpt")
    assert all(prune.target_reached for prune in after)


def pruning(sparsity, **arguments):
    return GradualPrune(sparsity, end=1.0, **arguments)


@pytest.mark.parametrize(
    ("after", "said"),
    [
        (lambda: pruning({"network.7": 0.8, "network.9": 0.9}), r"made with sparsity=0.8"),
        (lambda: pruning(0.8, exclude="network.9"), r"made with exclude=\[\];"),
    ],
)
def test_with_other_globs_or_another_exclude_the_schedule_goes_on(
    make_trainer, tmp_path, after, said
):
    with pytest.warns(UserWarning, match=said):
        resume_from_the_middle(make_trainer, tmp_path, [pruning(0.8)], [prune := after()])
    assert prune._run.clock.steps == [24]


def test_stacked_the_one_with_other_globs_goes_on_from_the_one_that_is_gone(make_trainer, tmp_path):
    before = [pruning({"network.7": 0.8}), pruning({"network.0": 0.5})]
    after = [pruning({"network.0": 0.5}), pruning({"network.[79]": 0.8})]
    with pytest.warns(UserWarning, match=r"made with sparsity=\{'network.7': 0.8\}"):
        resume_from_the_middle(make_trainer, tmp_path, before, after)
    assert [prune._run.clock.steps for prune in after] == [[24], [24]]


def test_stacked_where_several_are_gone_the_schedule_begins_anew_and_says_so(
    make_trainer, tmp_path
):
    before = [pruning({"network.7": 0.8}), pruning({"network.0": 0.5})]
    with pytest.warns(UserWarning, match=r"'network.\*'.*begins its schedule anew, zeros are kept"):
        resume_from_the_middle(
            make_trainer, tmp_path, before, [prune := pruning({"network.*": 0.8})]
        )
    assert prune._run.clock.steps == [12]


def test_a_longer_run_goes_on_with_the_span_it_had(make_trainer, tmp_path):
    fit(make_trainer, tmp_path)
    prune = GradualPrune(0.9, end=0.8)
    trainer = make_trainer(max_epochs=20, limit_train_batches=1, callbacks=[prune, ExactResume()])
    trainer.fit(Noisy(), small_data(), small_data(8), ckpt_path=tmp_path / "epoch=2.ckpt")
    assert prune._run.clock.span.end == 24
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


def test_a_link_to_a_checkpoint_that_is_gone_is_passed_over(tmp_path):
    torch.save({"a": 1}, tmp_path / "epoch=1.ckpt")
    (tmp_path / "last.ckpt").symlink_to("epoch=0.ckpt")
    assert last_checkpoint(tmp_path) == tmp_path / "epoch=1.ckpt"


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
