"""Pruning, low rank and distillation together, in every way in which Lightning trains."""

import sys
from functools import partial

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from slimnets import DistillationModule, GradualPrune, LowRank
from slimnets.pruning.schedules import linear, one_shot
from tests.distillation.students import Images, Perceptron
from tests.support import (
    SPARSITY,
    Classifier,
    assert_compressed,
    assert_equal,
    ranks,
    small_data,
    small_network,
    zeros,
)

# most of the data here has no validation part
pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")


def stack(at=None, **arguments):
    return [GradualPrune(SPARSITY, **{"end": 1.0, **arguments}), LowRank(r=2, at=at)]


def distilled(kind=small_network, **arguments):
    L.seed_everything(3, verbose=False)
    student = kind()
    if not isinstance(student, L.LightningModule):
        arguments["optimizer"] = partial(torch.optim.Adam, lr=0.01)
    return DistillationModule(student, small_network(), **arguments)


class Watch(L.Callback):
    """After which step the target was reached, and how many steps there were."""

    reached = None

    def on_train_batch_end(self, trainer, *_):
        self.steps = trainer.global_step
        prune = next(c for c in trainer.callbacks if isinstance(c, GradualPrune))
        if self.reached is None and prune.target_reached:
            self.reached = self.steps


@pytest.mark.parametrize(
    ("arguments", "at", "steps"),
    [
        ({"max_epochs": 3, "limit_train_batches": 0.5}, None, 9),
        ({"max_epochs": 3, "limit_train_batches": 4}, 0.5, 12),
        ({"max_epochs": 4, "overfit_batches": 2}, 0.5, 8),
        ({"max_epochs": 3, "accumulate_grad_batches": 4}, None, 6),
        ({"max_epochs": -1, "max_steps": 10}, 0.5, 10),
        ({"max_epochs": 9, "max_steps": 7, "accumulate_grad_batches": 2}, 0.5, 7),
        ({"fast_dev_run": 3}, None, 3),
        ({"fast_dev_run": True}, 0.5, 1),
    ],
)
def test_the_schedule_spans_exactly_the_steps_of_the_run(make_trainer, arguments, at, steps):
    watch, module = Watch(), distilled()
    trainer = make_trainer(callbacks=[*stack(at), watch], **arguments)
    trainer.fit(module, small_data(), small_data(8))
    assert watch.reached == watch.steps == steps
    assert_compressed(module.student)


SAME = {
    "as usual": {},
    "validation within epochs": {"val_check_interval": 2},
    "validation across epochs": {"val_check_interval": 5, "check_val_every_n_epoch": None},
    "no sanity check": {"num_sanity_val_steps": 0},
    "loaders made anew": {"reload_dataloaders_every_n_epochs": 1},
    "no inference mode": {"inference_mode": False},
    "no validation": {"limit_val_batches": 0},
    "a time limit": {"max_time": "00:01:00:00"},
    "barebones": dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar"])
    | {"enable_model_summary": None, "barebones": True},
}


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")  # what barebones is for
def test_what_does_not_concern_the_weights_does_not_change_them(make_trainer):
    first = None
    for name, arguments in SAME.items():
        module = distilled(Classifier)
        callbacks = stack(begin=0, end=15, every=2)
        trainer = make_trainer(max_epochs=3, callbacks=callbacks, **arguments)
        trainer.fit(module, small_data(), small_data(8))
        first = first or module
        assert trainer.global_step == 18, name
        for key, value in first.state_dict().items():
            assert torch.equal(value, module.state_dict()[key]), (name, key)
    assert_compressed(first.student.network)


class Stream(IterableDataset):
    """Without length; endless, or as many as it is told."""

    def __init__(self, images=None):
        self.images = images

    def __iter__(self):
        images, labels = small_data().dataset.tensors
        n = 0
        while self.images is None or n < self.images:
            yield images[n % 48], labels[n % 48]
            n += 1


@pytest.mark.parametrize("at", [None, 0.5])
def test_an_endless_stream_with_max_steps(make_trainer, at):
    watch, module = Watch(), distilled()
    trainer = make_trainer(max_steps=10, callbacks=[*stack(at), watch])
    trainer.fit(module, DataLoader(Stream(), batch_size=4))
    assert watch.reached == watch.steps == 10
    assert_compressed(module.student)


@pytest.mark.parametrize("at", [None, 8])
def test_a_stream_whose_end_nobody_knows_needs_ints(make_trainer, at):
    module = distilled()
    loader = DataLoader(Stream(48), batch_size=8)
    trainer = make_trainer(max_epochs=2, callbacks=stack(at, begin=0, end=10, every=2))
    trainer.fit(module, loader)
    assert trainer.global_step == 12
    assert_compressed(module.student)

    module = distilled()
    with pytest.raises(ValueError, match=r"end=1.0 is a fraction .* not known"):
        make_trainer(max_epochs=2, callbacks=stack(at, begin=0, every=1)).fit(module, loader)
    assert not ranks(module.student)


def test_a_time_limit_needs_ints_and_leaves_the_layers_where_there_are_none(make_trainer):
    module = distilled()
    with pytest.raises(ValueError, match=r"fraction of the run.*a time limit"):
        make_trainer(max_time="00:01:00:00", max_epochs=2, callbacks=stack()).fit(
            module, small_data()
        )
    assert not ranks(module.student)


@pytest.mark.filterwarnings("ignore:.*max_epochs=0:UserWarning")
@pytest.mark.parametrize(
    "arguments", [{"max_epochs": 0}, {"max_steps": 0}, {"max_epochs": 2, "limit_train_batches": 0}]
)
def test_a_run_without_a_step_leaves_the_layers_as_they_were(make_trainer, arguments):
    module = distilled()
    expected = distilled()
    make_trainer(callbacks=stack(), **arguments).fit(module, small_data())
    assert_equal(module.student, expected.student)


def test_one_trainer_twice(make_trainer):
    module = distilled()
    trainer = make_trainer(max_epochs=2, callbacks=stack())
    trainer.fit(module, small_data(), small_data(8))
    state = {name: value.clone() for name, value in module.state_dict().items()}
    trainer.fit(module, small_data(), small_data(8))  # no epoch is left
    assert_equal(module, state)
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, small_data(), small_data(8))
    assert trainer.global_step == 24
    assert_compressed(module.student)
    for name, value in module.student.named_parameters():
        assert not torch.equal(value, state[f"student.{name}"]), name  # it was trained
        if value.ndim > 1:
            assert torch.equal(value == 0, state[f"student.{name}"] == 0), name


def test_several_loggers_are_told_the_same(make_trainer, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    csv, board = CSVLogger(tmp_path / "csv"), TensorBoardLogger(tmp_path / "board")
    module = distilled()
    trainer = make_trainer(
        max_epochs=2, callbacks=stack(at=6), logger=[csv, board], log_every_n_steps=1
    )
    trainer.fit(module, small_data(), small_data(8))
    lines = (tmp_path / "csv/lightning_logs/version_0/metrics.csv").read_text().splitlines()
    names = lines[0].split(",")
    rows = [dict(zip(names, line.split(","), strict=True)) for line in lines[1:]]
    events = EventAccumulator(board.log_dir).Reload()
    tags = ("sparsity", "sparsity/target", "rank/7", "train/distillation_loss", "val/agreement")
    for tag in tags:
        written = {int(row["step"]): float(row[tag]) for row in rows if row.get(tag)}
        shown = {event.step: event.value for event in events.Scalars(tag)}
        assert shown == pytest.approx(written), tag
        assert shown, tag
    assert shown.keys() == {5, 11}
    sparsity = [event.value for event in events.Scalars("sparsity")]
    assert len(sparsity) == 12
    total = sum(p.numel() for p in module.student.parameters() if p.ndim > 1)
    assert sparsity[-1] == pytest.approx(sum(zeros(module.student).values()) / total)


class Gan(L.LightningModule):
    """Two networks, two optimizers; the discriminator steps twice as often."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16))
        self.discriminator = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 1))

    def training_step(self, batch, batch_idx):
        images = batch[0].flatten(1)
        noise, real = images[:, :8], images[:, 8:24]
        of_generator, of_discriminator = self.optimizers()
        with torch.no_grad():
            fake = self.generator(noise)
        guess = self.discriminator(torch.cat([real, fake]))
        truth = torch.cat([torch.ones(len(real), 1), torch.zeros(len(fake), 1)])
        of_discriminator.zero_grad()
        self.manual_backward(nn.functional.binary_cross_entropy_with_logits(guess, truth))
        of_discriminator.step()
        if batch_idx % 2:
            guess = self.discriminator(self.generator(noise))
            of_generator.zero_grad()
            self.manual_backward(
                nn.functional.binary_cross_entropy_with_logits(guess, torch.ones_like(guess))
            )
            of_generator.step()

    def configure_optimizers(self):
        return (
            torch.optim.Adam(self.generator.parameters(), lr=0.01),
            torch.optim.SGD(self.discriminator.parameters(), lr=0.1, momentum=0.9),
        )


def gan(wrap):
    torch.manual_seed(0)
    student = Gan()
    teacher = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 16))
    module = DistillationModule(student, teacher, logits="generator") if wrap else student
    return student, module


def fit_gan(make_trainer, wrap, *callbacks):
    student, module = gan(wrap)
    trainer = make_trainer(max_epochs=2, callbacks=list(callbacks))
    trainer.fit(module, small_data())
    return student, trainer


@pytest.mark.parametrize(("wrap", "at"), [(True, None), (True, 9), (False, None)])
def test_globs_choose_the_generator_of_a_gan_alone(make_trainer, wrap, at):
    prune = GradualPrune({"generator": SPARSITY}, begin=1, end=6, every=1)
    student, trainer = fit_gan(make_trainer, wrap, prune, LowRank({"generator": 4}, at=at))
    assert_compressed(student.generator, {"0": 4, "2": 4})
    assert not ranks(student.discriminator)
    assert set(zeros(student.discriminator).values()) == {0}
    for optimizer, network in zip(
        trainer.optimizers, (student.generator, student.discriminator), strict=True
    ):
        assert optimizer.param_groups[0]["params"] == list(network.parameters())


def test_both_networks_of_a_gan_are_pruned_by_the_steps_of_their_own_optimizers(make_trainer):
    seen = []

    class Record(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            counts = zeros(pl_module.student)
            seen.append([counts[f"{n}.0.first.weight"] for n in ("generator", "discriminator")])

    prune = GradualPrune(SPARSITY, begin=0, end=6, every=1, schedule=linear)
    student, _ = fit_gan(make_trainer, True, prune, LowRank(r=4, exclude="*.2"), Record())
    assert_compressed(student, {"generator.0": 4, "discriminator.0": 4})
    generator, discriminator = zip(*seen, strict=True)
    assert generator.index(generator[-1]) == 11  # the 6th of its steps is in the 12th batch
    assert discriminator.index(discriminator[-1]) == 5


class Dcgan(Gan):
    """What the generator makes once, both steps see: its graph outlives that of the other."""

    def __init__(self, frozen):
        super().__init__()
        self.generator[2].requires_grad_(not frozen)

    def training_step(self, batch, batch_idx):
        images = batch[0].flatten(1)
        fake = self.generator(images[:, :8])
        guess = self.discriminator(torch.cat([images[:, 8:24], fake.detach()]))
        truth = torch.cat([torch.ones(len(fake), 1), torch.zeros(len(fake), 1)])
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(nn.functional.binary_cross_entropy_with_logits(guess, truth))
            optimizer.step()
            for name, mask in self.trainer.callbacks[0].masks.items():
                assert not self.get_parameter(name)[~mask].any()
            guess, truth = self.discriminator(fake), torch.ones(len(fake), 1)

    def configure_optimizers(self):
        live = [p for p in self.generator.parameters() if p.requires_grad]
        return (
            torch.optim.SGD(self.discriminator.parameters(), lr=0.1, momentum=0.9),
            torch.optim.Adam(live, lr=0.01, weight_decay=0.1),
        )


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"sparsity": {"generator": SPARSITY}},
        {"initial": 0.5},
        {"schedule": one_shot},
        {"scope": "global"},
        {"scope": "global", "initial": 0.5},
    ],
)
def test_a_graph_may_outlive_the_step_of_another_optimizer(make_trainer, arguments, frozen):
    torch.manual_seed(0)
    module = Dcgan(frozen)
    prune = GradualPrune(**{"sparsity": SPARSITY, "begin": 0, "end": 6, "every": 1, **arguments})
    make_trainer(max_epochs=2, callbacks=[prune]).fit(module, small_data())
    counts, sizes = zeros(module), {n: mask.numel() for n, mask in prune.masks.items()}
    if prune.scope == "global":
        assert sum(counts.values()) == round(SPARSITY * sum(sizes.values()))
    else:
        assert counts == dict.fromkeys(counts, 0) | {
            n: round(SPARSITY * k) for n, k in sizes.items()
        }


class Unwrapped(Classifier):
    """Steps an optimizer that Lightning does not wrap, and so does not count."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
        optimizer.step()


def test_steps_that_lightning_does_not_count(make_trainer):
    module = distilled(Unwrapped)
    trainer = make_trainer(max_epochs=1, callbacks=stack(begin=0, end=6, every=1))
    trainer.fit(module, small_data())
    assert trainer.global_step == 0
    assert_compressed(module.student.network)


class Late(Classifier):
    """Makes its layers in ``configure_model``."""

    def __init__(self):
        super().__init__(nn.Identity())
        self.layers = None

    def configure_model(self):
        if self.layers is None:
            self.layers = small_network()

    def forward(self, x):
        return self.layers(x)


@pytest.mark.parametrize(("wrap", "at"), [(True, None), (True, 6), (False, None)])
def test_layers_of_configure_model(make_trainer, tmp_path, wrap, at):
    def make():
        return distilled(Late) if wrap else Late()

    module = make()
    trainer = make_trainer(max_epochs=2, callbacks=stack(at))
    trainer.fit(module, small_data(), small_data(8))
    assert_compressed((module.student if wrap else module).layers)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    expected = trainer.predict(module, small_data(8))
    found = make_trainer(callbacks=stack(at)).predict(
        make(), small_data(8), ckpt_path=tmp_path / "x.ckpt"
    )
    assert torch.equal(found[0], expected[0])


class Data(Images):
    def val_dataloader(self):
        return small_data(16)

    test_dataloader = predict_dataloader = val_dataloader


@pytest.fixture
def configuration(tmp_path):
    save_file(Perceptron(32).state_dict(), tmp_path / "teacher.safetensors")
    network = "tests.distillation.students.Perceptron"
    trainer = {"max_epochs": 2, "accelerator": "cpu", "devices": 1, "logger": False}
    trainer |= {"enable_progress_bar": False, "enable_model_summary": False}
    trainer["callbacks"] = [
        {
            "class_path": "slimnets.GradualPrune",
            "init_args": {
                "sparsity": {"layers.1": 0.5, "layers.*": 0.75},
                "schedule": "slimnets.pruning.schedules.linear",
                "end": 0.9,
            },
        },
        {"class_path": "slimnets.LowRank", "init_args": {"r": {"*.1": 4, "*": 0.5}}},
        {
            "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
            "init_args": {"filename": "last"},
        },
    ]
    model = {
        "student": {"class_path": network, "init_args": {"hidden": 16}},
        "teacher": {"class_path": network, "init_args": {"hidden": 32}},
        "teacher_weights": str(tmp_path / "teacher.safetensors"),
        "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}},
    }
    path = tmp_path / "config.yaml"
    whole = {"seed_everything": 1, "trainer": trainer, "model": model}
    path.write_text(yaml.safe_dump(whole, sort_keys=False))
    return path


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_everything_from_the_command_line(configuration, tmp_path, monkeypatch):
    def run(subcommand, name, config=configuration, **arguments):
        arguments = [f"--{key}={value}" for key, value in arguments.items()]
        root = f"--trainer.default_root_dir={tmp_path / name}"
        arguments = [subcommand, f"--config={config}", root, *arguments]
        monkeypatch.setattr(sys, "argv", ["train"])
        return LightningCLI(DistillationModule, Data, args=arguments)

    cli = run("fit", "a")
    student = cli.model.student
    assert ranks(student) == {"layers.1": 4, "layers.3": 2}
    for name, count in zeros(student).items():
        share = 0.5 if name.startswith("layers.1") else 0.75
        assert count == round(share * student.get_parameter(name).numel()), name
    weights = load_file(tmp_path / "teacher.safetensors")
    assert all(torch.equal(weights[k], v) for k, v in cli.model.teacher.state_dict().items())

    again = run("fit", "b", tmp_path / "a/config.yaml")  # which the first run has written
    assert_equal(again.model, cli.model)
    assert again.trainer.callbacks[0].schedule is cli.trainer.callbacks[0].schedule

    checkpoint = cli.trainer.checkpoint_callback.best_model_path
    assert checkpoint.endswith("last.ckpt")
    for subcommand in ("validate", "test", "predict"):
        fresh = run(subcommand, subcommand, ckpt_path=checkpoint)
        assert_equal(fresh.model, cli.model)
        metrics = fresh.trainer.callback_metrics
        assert subcommand == "predict" or metrics[f"{subcommand[:4].rstrip('i')}/agreement"] > 0
    resumed = run("fit", "c", ckpt_path=checkpoint, **{"trainer.max_epochs": 3})
    assert resumed.trainer.current_epoch == 3
    assert ranks(resumed.model.student) == ranks(student)
    assert {n: p == 0 for n, p in student.named_parameters()}.keys() == dict(
        resumed.model.student.named_parameters()
    ).keys()
    assert zeros(resumed.model.student) == zeros(student)
    assert isinstance(resumed.trainer.checkpoint_callback, ModelCheckpoint)


@pytest.mark.filterwarnings("ignore:.*configure_optimizers` will be overridden")
@pytest.mark.parametrize("at", [None, 3])
def test_the_optimizer_of_the_command_line_is_there_before_the_pairs(
    configuration, tmp_path, monkeypatch, at
):
    whole = yaml.safe_load(configuration.read_text())
    whole["trainer"]["callbacks"][1]["init_args"]["at"] = at
    configuration.write_text(yaml.safe_dump(whole, sort_keys=False))
    folder = tmp_path / "fit"
    arguments = ["fit", f"--config={configuration}", f"--trainer.default_root_dir={folder}"]
    arguments += ["--optimizer=SGD", "--optimizer.lr=0.1"]
    monkeypatch.setattr(sys, "argv", ["train"])

    if at is None:
        with pytest.raises(ValueError, match=r"SGD would go on .* LightningCLI makes that of"):
            LightningCLI(DistillationModule, Data, args=arguments)
    else:
        cli = LightningCLI(DistillationModule, Data, args=arguments)
        assert ranks(cli.model.student) == {"layers.1": 4, "layers.3": 2}
