"""Pruning, low rank and distillation together, beside the callbacks that Lightning has."""

import copy
import io
import logging
from functools import partial

import lightning as L
import pytest
import rich
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    BatchSizeFinder,
    DeviceStatsMonitor,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelSummary,
    RichModelSummary,
    RichProgressBar,
    StochasticWeightAveraging,
    Timer,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from torch import nn

from slimnets import DistillationModule, GradualPrune, LowRank, after_target, factorize
from tests.support import (
    SPARSITY,
    Backbone,
    Classifier,
    Worse,
    assert_compressed,
    assert_equal,
    ranks,
    small_data,
    small_network,
)

# most of the data here has no validation part
pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")


def stack(**arguments):
    return [GradualPrune(SPARSITY, **arguments), LowRank(r=2)]


def distilled(student=None, **arguments):
    student = small_network() if student is None else student
    if not isinstance(student, L.LightningModule):
        arguments.setdefault("optimizer", partial(torch.optim.Adam, lr=0.01))
    return DistillationModule(student, small_network(), **arguments)


class Tuned(Classifier):
    """What the finders ask of a module: a learning rate, a batch size, and loaders that use it."""

    limit = 10**9

    def __init__(self, lr=0.02, batch_size=8):
        super().__init__()
        self.lr, self.batch_size = lr, batch_size

    @property
    def settings(self):
        return self

    def train_dataloader(self):
        return small_data(96, self.settings.batch_size)

    def val_dataloader(self):
        return small_data(8)

    def training_step(self, batch, batch_idx):
        if len(batch[0]) > self.limit:
            raise RuntimeError("CUDA out of memory.")
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.settings.lr)


class InHyperParameters(Tuned):
    """Likewise, as most users write it."""

    def __init__(self, lr=0.02, batch_size=8):
        super().__init__()
        del self.lr, self.batch_size
        self.save_hyperparameters("lr", "batch_size")

    @property
    def settings(self):
        return self.hparams


class Watch(L.Callback):
    """When the target was reached, and how many steps there were."""

    def on_train_start(self, trainer, pl_module):
        self.reached = None
        self.target = next(c for c in trainer.callbacks if isinstance(c, GradualPrune))
        assert not self.target.target_reached

    def on_train_batch_end(self, trainer, *_):
        self.steps = trainer.global_step
        if self.reached is None and self.target.target_reached:
            self.reached = self.steps


def seeded(kind, *arguments, wrap):
    L.seed_everything(5, verbose=False)
    student = kind(*arguments)
    return student, distilled(student) if wrap else student


@pytest.mark.parametrize(
    ("how", "kind", "wrap"),
    [
        ("callback", InHyperParameters, True),
        ("callback", Tuned, False),
        ("tuner", Tuned, True),
    ],
)
def test_a_learning_rate_is_found_and_the_run_is_as_if_it_had_been_given(
    make_trainer, how, kind, wrap
):
    student, module = seeded(kind, wrap=wrap)
    before = str(student)
    callbacks = stack(end=1.0)
    if how == "callback":
        callbacks.append(LearningRateFinder(num_training_steps=15))
        make_trainer(max_epochs=2, callbacks=callbacks).fit(module)
        found = callbacks[-1].optimal_lr.suggestion()
    else:
        trainer = make_trainer(max_epochs=2, callbacks=callbacks)
        found = Tuner(trainer).lr_find(module, num_training=15).suggestion()
        assert str(student) == before
        trainer.fit(module)
    given, again = seeded(kind, found, wrap=wrap)
    assert student.settings.lr == found != 0.02
    make_trainer(max_epochs=2, callbacks=stack(end=1.0)).fit(again)
    assert_compressed(student.network)
    assert_equal(student, given)


@pytest.mark.parametrize(
    ("how", "mode", "kind", "wrap"),
    [
        ("callback", "power", Tuned, True),
        ("callback", "binsearch", InHyperParameters, False),
        ("tuner", "binsearch", InHyperParameters, True),
    ],
)
def test_a_batch_size_is_found_and_the_schedule_spans_the_run_of_that_size(
    make_trainer, how, mode, kind, wrap, monkeypatch
):
    monkeypatch.setattr(Tuned, "limit", 20)
    watch, expected = Watch(), 16 if mode == "power" else 19  # 20, and 5 % of margin
    arguments = {"mode": mode, "steps_per_trial": 1, "init_val": 8}
    student, module = seeded(kind, wrap=wrap)
    callbacks = [*stack(end=1.0), watch]
    if how == "callback":
        callbacks.append(BatchSizeFinder(**arguments))
        make_trainer(max_epochs=2, callbacks=callbacks).fit(module)
    else:
        trainer = make_trainer(max_epochs=2, callbacks=callbacks)
        Tuner(trainer).scale_batch_size(module, **arguments)
        assert not ranks(student)
        trainer.fit(module)
    assert student.settings.batch_size == expected
    assert watch.reached == watch.steps == 2 * -(-96 // expected)
    given, again = seeded(kind, 0.02, expected, wrap=wrap)
    make_trainer(max_epochs=2, callbacks=stack(end=1.0)).fit(again)
    assert_compressed(student.network)
    assert_equal(student, given)


class Data(L.LightningDataModule):
    def __init__(self, batch_size=4):
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self):
        return small_data(96, self.batch_size)

    def val_dataloader(self):
        return small_data(8)

    def predict_dataloader(self):
        return self.train_dataloader()


def test_the_batch_size_of_a_data_module_is_found_for_any_student(make_trainer):
    data, watch = Data(), Watch()
    trainer = make_trainer(max_epochs=2, callbacks=[*stack(end=1.0), watch])
    module = distilled()
    tuner = Tuner(trainer)
    size = tuner.scale_batch_size(module, datamodule=data, max_trials=3, steps_per_trial=1)
    assert data.batch_size == size == 8
    trainer.fit(module, datamodule=data)
    assert watch.reached == watch.steps == 24
    assert_compressed(module.student)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    data.batch_size = 4
    tuner.scale_batch_size(module, datamodule=data, method="predict", max_trials=3)
    assert data.batch_size == 8
    assert_equal(module, state)


def test_a_student_without_a_learning_rate_of_its_own(make_trainer):
    class Own(DistillationModule):
        lr = 0.5

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    module = Own(small_network(), small_network())
    trainer = make_trainer(max_epochs=2, callbacks=stack())
    found = Tuner(trainer).lr_find(module, small_data(96), num_training=15).suggestion()
    assert module.lr == found != 0.5
    with pytest.raises(AttributeError, match="'lr', 'learning_rate'"):
        Tuner(make_trainer(max_epochs=1)).lr_find(distilled(), small_data())


@pytest.mark.parametrize("at", [None, 0.5])
def test_a_schedule_of_gradient_accumulation(make_trainer, at):
    watch = Watch()
    accumulate = GradientAccumulationScheduler({0: 4, 1: 1, 2: 3})
    callbacks = [GradualPrune(SPARSITY, end=1.0), LowRank(r=2, at=at), accumulate, watch]
    module = distilled()
    make_trainer(max_epochs=4, callbacks=callbacks).fit(module, small_data(), small_data(8))
    assert watch.reached == watch.steps == 2 + 6 + 2 + 2
    assert_compressed(module.student)


class Unfreeze(BaseFinetuning):
    """As BackboneFinetuning, written by a user for a module of any depth."""

    def freeze_before_training(self, pl_module):
        self.freeze(self.layers(pl_module), train_bn=False)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(self.layers(pl_module), optimizer, train_bn=False)

    @staticmethod
    def layers(pl_module):
        return pl_module.student.backbone


class Groups(L.Callback):
    """The names of the parameters in each group of the optimizer, of each epoch."""

    def on_train_start(self, trainer, pl_module):
        self.epochs, self.weights = [], []

    def on_train_epoch_end(self, trainer, pl_module):
        names = {p: n for n, p in pl_module.named_parameters()}
        groups = trainer.optimizers[0].param_groups
        self.epochs.append([{names[p] for p in group["params"]} for group in groups])
        dense = pl_module.get_parameter("student.backbone.3.first.weight")
        self.weights.append(dense.detach().clone())


FINETUNING = {
    "backbone": lambda: BackboneFinetuning(1, train_bn=False),
    "own": lambda: Unfreeze(),
}


@pytest.mark.parametrize(("finetuning", "order"), [("backbone", 1), ("backbone", -1), ("own", 1)])
def test_finetuning_freezes_and_unfreezes_the_pairs_of_the_layers(make_trainer, finetuning, order):
    groups, prune = Groups(), GradualPrune(SPARSITY, begin=13, end=18)
    callbacks = [prune, LowRank(r=2), FINETUNING[finetuning]()][::order]
    student = Backbone()
    trainer = make_trainer(max_epochs=3, callbacks=[*callbacks, groups])
    trainer.fit(distilled(student), small_data(), small_data(8))
    layer = ("first.weight", "second.weight", "second.bias")
    body = {f"student.backbone.{n}.{name}" for n in (0, 3) for name in layer}
    head = {f"student.network.{n}.{name}" for n in (7, 9) for name in layer}
    if finetuning == "backbone":  # train_bn=False is of the layers that it unfreezes
        head |= {"student.backbone.1.weight", "student.backbone.1.bias"}
    assert groups.epochs == [[head], [head, body], [head, body]]
    assert not torch.equal(groups.weights[0], groups.weights[1])
    assert_compressed(
        student, {f"backbone.{n}": 2 for n in (0, 3)} | {f"network.{n}": 2 for n in (7, 9)}
    )


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_frozen_backbone_does_not_move_and_a_resumed_run_goes_on(make_trainer, tmp_path):
    def run(ckpt_path=None, name="a"):
        L.seed_everything(5, verbose=False)
        student, groups = Backbone(), Groups()
        dense = copy.deepcopy(student)
        callbacks = [BackboneFinetuning(1, train_bn=False), *stack(begin=8, end=16), groups]
        callbacks.append(ModelCheckpoint(tmp_path / name, filename="{epoch}", save_top_k=-1))
        trainer = make_trainer(max_epochs=3, callbacks=callbacks, enable_checkpointing=True)
        trainer.fit(distilled(student), small_data(), small_data(8), ckpt_path=ckpt_path)
        return student, groups, dense

    whole, groups, dense = run()
    assert torch.equal(groups.weights[0], factorize(dense, r=2).backbone[3].first.weight)
    again, resumed, _ = run(tmp_path / "a/epoch=0.ckpt", name="resumed")
    assert_equal(whole, again)
    assert resumed.epochs == groups.epochs[1:]


def test_replacing_in_the_middle_of_a_finetuning_is_refused(make_trainer):
    student = Backbone()
    callbacks = [BackboneFinetuning(1), LowRank(r=2, at=4)]
    with pytest.raises(NotImplementedError, match="does not support BackboneFinetuning"):
        make_trainer(max_epochs=3, callbacks=callbacks).fit(distilled(student), small_data())
    assert not ranks(student)


def test_the_bar_of_rich_shows_the_sparsity(make_trainer, monkeypatch):
    text = io.StringIO()
    bar = RichProgressBar(refresh_rate=1, leave=True)
    bar._console_kwargs = {"file": text, "force_terminal": True, "width": 300}
    trainer = make_trainer(max_epochs=2, callbacks=[*stack(), bar], enable_progress_bar=True)
    module = distilled()
    trainer.fit(module, small_data(), small_data(8))
    assert_compressed(module.student)
    rich.reconfigure()  # the console of the whole process
    assert "sparsity: 0.751" in text.getvalue()


def test_summaries_show_the_factorized_layers(make_trainer, capsys, caplog, monkeypatch):
    # where the root had no handler yet, Lightning's log goes past it
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "propagate", True)
    for summary in (ModelSummary(max_depth=4), RichModelSummary(max_depth=4)):
        module = distilled()
        trainer = make_trainer(
            max_epochs=1, callbacks=[summary, *stack()], enable_model_summary=True
        )
        with caplog.at_level("INFO"):
            trainer.fit(module, small_data())
        text = capsys.readouterr().out + caplog.text
        assert "student.7 " in text, text
        row = next(line for line in text.splitlines() if "student.7 " in line)
        assert "LowRankPair" in row
        assert f"{sum(p.numel() for p in module.student[7].parameters())}" in row
        assert "student.7.second" in text
        assert "teacher" not in text
        caplog.clear()


def test_monitors_of_learning_rate_and_device_log_beside_ours(make_trainer, tmp_path):
    pytest.importorskip("psutil")
    logger = CSVLogger(tmp_path)
    monitors = [LearningRateMonitor("step"), DeviceStatsMonitor()]
    callbacks = [*stack(), *monitors, EMAWeightAveraging(decay=0.5)]
    module = distilled()
    trainer = make_trainer(max_epochs=3, callbacks=callbacks, logger=logger, log_every_n_steps=1)
    trainer.fit(module, small_data(), small_data(8))
    header = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()[0]
    columns = set(header.split(","))
    assert {"lr-Adam", "sparsity", "rank/7", "train/student_loss"} <= columns
    assert any(name.startswith("DeviceStatsMonitor") for name in columns)
    assert_compressed(module.student)


def test_early_stopping_and_the_best_checkpoint_wait_for_the_whole_stack(make_trainer, tmp_path):
    best = after_target(ModelCheckpoint(tmp_path, monitor="loss"))
    stopping = after_target(EarlyStopping("loss", patience=1))
    callbacks = [GradualPrune(SPARSITY, end=18), LowRank(r=2, at=20), stopping, best]
    trainer = make_trainer(max_epochs=9, callbacks=callbacks, enable_checkpointing=True)
    student = Worse()
    module = distilled(student)
    trainer.fit(module, small_data(), small_data(8))
    assert trainer.current_epoch == 5  # pruned after 3, replaced in the 4th, and one of patience
    state = torch.load(best.best_model_path)["state_dict"]
    fresh = Worse()
    loaded = DistillationModule.load_from_checkpoint(
        best.best_model_path, student=fresh, teacher=module.teacher
    )
    assert loaded.student is fresh
    assert all(torch.equal(v, state[f"student.{k}"]) for k, v in fresh.state_dict().items())
    assert_compressed(fresh.network)


def test_a_timer_ends_the_run_at_its_time(make_trainer):
    class Clock(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 15:
                timer._offset = timer._duration  # an hour passes

    timer = Timer("00:01:00:00")
    module = distilled()
    callbacks = [*stack(begin=0, end=12, every=1), Clock(), timer]
    trainer = make_trainer(max_epochs=-1, callbacks=callbacks)
    trainer.fit(module, small_data())
    assert trainer.global_step == 15
    assert_compressed(module.student)


AVERAGES = {
    "swa": lambda: StochasticWeightAveraging(0.01, swa_epoch_start=2),
    "ema": lambda: EMAWeightAveraging(decay=0.9),
}


@pytest.mark.parametrize(("average", "at"), [("swa", 14), ("ema", None)])
def test_averages_end_compressed_and_are_what_the_student_is_given(make_trainer, average, at):
    class Live(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == 24 and trainer.current_epoch == 3:
                self.weight = pl_module.student[7].first.weight.detach().clone()

    live = Live()
    callbacks = [AVERAGES[average](), GradualPrune(SPARSITY, end=0.9), LowRank(r=2, at=at), live]
    module = distilled()
    make_trainer(max_epochs=4, callbacks=callbacks).fit(module, small_data(), small_data(8))
    assert_compressed(module.student)
    assert not torch.equal(module.student[7].first.weight, live.weight)  # but an average


def test_the_finder_beside_averages_and_a_replacement_in_the_middle(make_trainer):
    finder = LearningRateFinder(num_training_steps=15)
    callbacks = [EMAWeightAveraging(decay=0.5), finder, GradualPrune(SPARSITY, end=0.9)]
    student = Tuned()
    make_trainer(max_epochs=3, callbacks=[*callbacks, LowRank(r=2, at=0.5)]).fit(distilled(student))
    assert finder.optimal_lr.suggestion() == student.lr
    assert_compressed(student.network)


def test_what_is_looked_for_in_a_module_is_the_students(make_trainer):
    student = Backbone()
    module = distilled(student)
    assert module.backbone is student.backbone
    assert not hasattr(module, "lr")
    module.lr = 0.3  # of a subclass, say
    assert module.lr == 0.3
    assert not hasattr(student, "lr")
    plain = distilled()
    plain.backbone = nn.Linear(2, 2)
    assert plain.backbone.in_features == 2
    assert not hasattr(plain, "batch_size")
