"""GradualPrune on the real Trainer."""

import copy
import csv
import io
from functools import partial

import lightning as L
import numpy as np
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    LearningRateFinder,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.utils.data import DataLoader

from slimnets import GradualPrune, LowRank
from slimnets.pruning import linear, one_shot, random
from tests.pruning.runs import LearningRate, expected, run
from tests.support import CalledModule, Classifier, Save, assert_equal, small_data, zeros

WEIGHTS = ["0.weight", "3.weight", "7.weight", "9.weight"]

OPTIMIZERS = [
    (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-2}),
    (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-2}),
    (torch.optim.Adam, {"lr": 0.01, "weight_decay": 1e-2}),
    (torch.optim.AdamW, {"lr": 0.01, "amsgrad": True}),
    (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.9}),
    (torch.optim.LBFGS, {"lr": 0.1, "max_iter": 3}),
]


@pytest.mark.parametrize(("optimizer", "arguments"), OPTIMIZERS)
def test_zeros_are_exact_after_every_step_and_in_number_at_the_end(
    make_trainer, optimizer, arguments
):
    prune = GradualPrune(0.9)
    module = Classifier(optimizer=optimizer, **arguments)
    module, watch, _ = run(make_trainer, prune, module)
    assert zeros(module) == expected(module, 0.9)
    assert watch.history == sorted(watch.history)
    assert len(set(watch.history)) > 5
    assert prune.target_reached


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_precisions_and_clipping(make_trainer, precision, clip):
    module, *_ = run(
        make_trainer, GradualPrune(0.8), precision=precision, gradient_clip_val=clip, epochs=2
    )
    assert zeros(module) == expected(module, 0.8)


def test_clipping_sees_the_norm_of_the_live_weights_only(make_trainer):
    norms = []

    class Norms(Classifier):
        def configure_gradient_clipping(self, optimizer, *args, **kwargs):
            super().configure_gradient_clipping(optimizer, *args, **kwargs)
            for name, mask in prune.masks.items():
                norms.append(float(self.get_parameter(name).grad[~mask].abs().sum()))

    prune = GradualPrune(0.9, end=0.1)
    run(make_trainer, prune, Norms(), gradient_clip_val=1.0, epochs=1)
    assert len(norms) == 6 * 4
    assert not any(norms)


def test_manual_optimization_clips_by_the_norm_of_the_live_weights_only(make_trainer):
    norms = []

    class Clips(Classifier):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
            for name, mask in prune.masks.items():
                norms.append(float(self.get_parameter(name).grad[~mask].abs().sum()))
            self.clip_gradients(optimizer, 1.0, "norm")
            optimizer.step()

    prune = GradualPrune(0.9, begin=0, end=3, every=1)
    run(make_trainer, prune, Clips(), epochs=1)
    assert len(norms) == 6 * 4
    assert not any(norms)


def test_initial_sparsity_is_there_from_the_first_step(make_trainer):
    prune = GradualPrune(0.8, initial=0.4, begin=0, end=10, every=5)
    _, watch, _ = run(make_trainer, prune, epochs=2)
    total = sum(mask.numel() for mask in prune.masks.values())
    assert watch.history[0] / total == pytest.approx(0.4, abs=1e-3)


def test_one_shot_prunes_everything_at_begin(make_trainer):
    prune = GradualPrune(0.8, begin=3, end=10, every=1, schedule=one_shot)
    _, watch, _ = run(make_trainer, prune, epochs=2)
    assert watch.history[:2] == [0, 0]
    assert len(set(watch.history[2:])) == 1


def test_globally_and_by_mapping(make_trainer):
    module, *_ = run(make_trainer, GradualPrune(0.7, scope="global"))
    total = sum(expected(module, 1.0).values())
    assert sum(zeros(module).values()) == round(0.7 * total)

    module, *_ = run(make_trainer, GradualPrune({"network.7": 0.9, "network.[0-3]": 0.5}))
    counts, sizes = zeros(module), expected(module, 1.0)
    assert counts["network.7.weight"] == round(0.9 * 8192)
    assert counts["network.3.weight"] == round(0.5 * sizes["network.3.weight"])
    assert counts["network.9.weight"] == 0


def test_a_users_schedule_and_criterion(make_trainer):
    def slow(progress):
        return progress**2

    def largest(parameter):
        return -parameter.abs()

    module, *_ = run(make_trainer, GradualPrune(0.5, schedule=slow, criterion=largest))
    assert zeros(module) == expected(module, 0.5)


def test_the_state_dict_keeps_its_keys_and_loads_into_a_plain_network(make_trainer):
    keys = list(Classifier().state_dict())
    module, *_ = run(make_trainer, GradualPrune(0.9))
    assert list(module.state_dict()) == keys
    Classifier().load_state_dict(module.state_dict())
    copied = copy.deepcopy(module)
    assert zeros(copied) == expected(module, 0.9)
    buffer = io.BytesIO()
    torch.save(module, buffer)


def test_a_buffer_named_like_a_mask(make_trainer, tmp_path):
    module = Classifier()
    module.network.register_buffer("attention_mask", torch.ones(3))
    module, _, trainer = run(make_trainer, GradualPrune(0.9), module)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    state = torch.load(tmp_path / "x.ckpt")["state_dict"]
    assert torch.equal(state["network.attention_mask"], torch.ones(3))
    assert {k for k in state if "mask" in k} == {"network.attention_mask"}


def test_a_second_fit_keeps_the_zeros_and_does_not_compound(make_trainer):
    prune = GradualPrune(0.5)
    module, _, trainer = run(make_trainer, prune)
    first = {n: p == 0 for n, p in module.named_parameters() if p.ndim > 1}
    trainer.fit_loop.max_epochs = 6
    trainer.fit(module, small_data(), small_data(8))
    assert zeros(module) == expected(module, 0.5)
    assert all(torch.equal(module.get_parameter(n) == 0, mask) for n, mask in first.items())

    run(make_trainer, GradualPrune(0.8), module)  # a new Trainer, a new callback
    assert zeros(module) == expected(module, 0.8)
    assert all((module.get_parameter(n)[mask] == 0).all() for n, mask in first.items())


def test_a_network_that_is_sparser_than_asked_keeps_its_zeros_and_says_so(make_trainer):
    module, *_ = run(make_trainer, GradualPrune(0.8))
    with pytest.warns(UserWarning, match=r"more zeros than asked.*'network.7.weight' with 80.0%"):
        run(make_trainer, GradualPrune(0.5), module)
    assert zeros(module) == expected(module, 0.8)


@pytest.mark.parametrize("average", [WeightAveraging, lambda: EMAWeightAveraging(decay=0.999)])
@pytest.mark.parametrize("first", [True, False])
def test_averaged_weights_are_as_sparse(make_trainer, tmp_path, average, first):
    prune, average = GradualPrune(0.9, end=0.9), average()
    callbacks = [average, prune] if first else [prune, average]
    trainer = make_trainer(max_epochs=3, callbacks=[*callbacks, Save(tmp_path)])
    module = Classifier()
    trainer.fit(module, small_data(), small_data(8))
    assert zeros(module) == expected(module, 0.9)
    paths = [tmp_path / f"{step}.ckpt" for step in (6, 12, 18)]
    for checkpoint in (torch.load(path) for path in paths):
        averaged, live = Classifier(), Classifier()
        averaged.load_state_dict(checkpoint["state_dict"])
        live.load_state_dict(checkpoint["current_model_state"])
        assert zeros(averaged) == zeros(live)
        assert not torch.equal(averaged.network[0].weight, live.network[0].weight)
    assert zeros(averaged) == expected(module, 0.9)


def test_checkpoints_hold_sparse_averages_while_training(make_trainer, tmp_path):
    counts = []

    class Save(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / "x.ckpt")
            state = torch.load(tmp_path / "x.ckpt")["state_dict"]
            counts.append({k: int((v == 0).sum()) for k, v in state.items() if v.ndim > 1})

    prune = GradualPrune(0.9, end=0.6)
    module, *_ = run(
        make_trainer, prune, callbacks=[EMAWeightAveraging(decay=0.999), Save()], epochs=3
    )
    assert counts[-1] == expected(module, 0.9)


@pytest.mark.parametrize("kind", [Classifier, CalledModule])
def test_stochastic_weight_averaging(make_trainer, kind):
    prune = GradualPrune(0.9, end=1.0)
    swa = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
    module, *_ = run(make_trainer, prune, kind(), callbacks=[swa], epochs=4)
    assert prune._run.clock.span.end == 24  # not 30: the epoch that SWA adds has no steps
    assert zeros(module) == expected(module, 0.9)


def test_the_learning_rate_finder_does_not_prune(make_trainer):
    prune = GradualPrune(0.9)
    module, watch, _ = run(
        make_trainer,
        prune,
        LearningRate(),
        callbacks=[LearningRateFinder(num_training_steps=10)],
    )
    assert zeros(module) == expected(module, 0.9)
    assert watch.history[0] < 0.5 * watch.history[-1]


class Fine(LearningRateFinder):
    """As in Lightning's documentation: a trial in the middle of the run."""

    def on_fit_start(self, trainer, pl_module):
        pass

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 2:
            self.lr_find(trainer, pl_module)


def test_a_finder_in_the_middle_of_the_run_does_not_prune(make_trainer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the trial's checkpoint
    curves = []
    for callbacks in [], [Fine(num_training_steps=15, max_lr=1, early_stop_threshold=None)]:
        prune = GradualPrune(0.9, end=1.0, schedule=linear)
        _, watch, _ = run(make_trainer, prune, LearningRate(), callbacks=callbacks, epochs=5)
        assert prune.target_reached
        curves.append(watch.history[-18:])  # the trial's are before
    assert curves[0] == curves[1]


class Writes(Classifier):
    """Changes its weights itself, as a mean teacher does with the teacher's."""

    def on_train_batch_end(self, *_):
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(0.01)


def test_weights_that_are_written_between_steps(make_trainer):
    class Look(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            self.seen = zeros(pl_module)

        def on_validation_epoch_end(self, trainer, pl_module):
            self.validated = zeros(pl_module)

    look = Look()
    module, *_ = run(make_trainer, GradualPrune(0.9), Writes(), callbacks=[look])
    assert zeros(module) == look.seen == look.validated == expected(module, 0.9)


class WritesAtTheEnd(L.Callback):
    """Gives the module an average of its own, as a user's callback does."""

    def __init__(self, hook):
        def write(trainer, pl_module, **_):
            with torch.no_grad():
                for parameter in pl_module.parameters():
                    parameter.add_(0.01)

        setattr(self, hook, write)


@pytest.mark.parametrize("hook", ["on_train_end", "on_fit_end"])
@pytest.mark.parametrize("first", [True, False])
def test_weights_that_are_written_at_the_end(make_trainer, hook, first):
    module, prune, writes = Classifier(), GradualPrune(0.9), WritesAtTheEnd(hook)
    callbacks = [writes, prune] if first else [prune, writes]
    make_trainer(max_epochs=1, callbacks=callbacks).fit(module, small_data(), small_data(8))
    assert zeros(module) == expected(module, 0.9)
    module = Classifier()
    setattr(module, hook, partial(getattr(writes, hook), None, module))
    run(make_trainer, GradualPrune(0.9), module)
    assert zeros(module) == expected(module, 0.9)


def test_layers_too_small_for_so_many_zeros_are_named(make_trainer):
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.Linear(32, 1))
    network.append(nn.Linear(1, 4))
    with pytest.warns(UserWarning, match=r"pruning leaves nothing of '.*2\.weight', '.*3\.weight'"):
        run(make_trainer, GradualPrune(0.99), Classifier(network))


@pytest.mark.parametrize("arguments", [{}, {"begin": 10, "end": 1000, "every": 10}])
def test_a_smoke_run_goes_through_everything(make_trainer, arguments):
    module, *_ = run(make_trainer, GradualPrune(0.9, **arguments), fast_dev_run=2)
    assert zeros(module) == expected(module, 0.9)


def test_frozen_weights_are_pruned_too(make_trainer):
    module = Classifier()
    module.network[0].requires_grad_(False)
    module, *_ = run(make_trainer, GradualPrune(0.9), module)
    assert zeros(module) == expected(module, 0.9)


def test_weights_that_are_computed_are_named(make_trainer):
    module = Classifier()
    nn.utils.parametrizations.weight_norm(module.network[9])
    with pytest.warns(UserWarning, match=r"leaves 'network.9' alone"):
        run(make_trainer, GradualPrune(0.9), module)


class Tied(Classifier):
    """Its last layer has the weight of an embedding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(4, 32)
        self.network[9].weight = self.embedding.weight


@pytest.mark.parametrize("exclude", ["network.9", lambda name, layer: layer.out_features == 4])
def test_what_is_excluded_is_left_alone_without_a_word(make_trainer, exclude):
    with pytest.warns(UserWarning, match=r"leaves 'network.9' alone"):
        run(make_trainer, GradualPrune(0.9), Tied())
    if callable(exclude):
        choose = exclude
        exclude = lambda name, layer: isinstance(layer, nn.Linear) and choose(name, layer)  # noqa: E731
    run(make_trainer, GradualPrune(0.9, exclude=exclude), Tied())  # a warning would be an error


def test_a_layer_without_weights_is_passed_by(make_trainer):
    module = Classifier()
    module.empty = nn.Linear(1, 3)
    module.empty.weight = nn.Parameter(torch.empty(3, 0))
    module, *_ = run(make_trainer, GradualPrune(0.9), module)
    assert zeros(module)["network.9.weight"] == expected(module, 0.9)["network.9.weight"]


class Conv1D(nn.Module):
    """That of transformers: a linear layer of another type."""

    def __init__(self, n):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(n, n)), nn.Parameter(torch.zeros(n))

    def forward(self, x):
        return x @ self.weight + self.bias


def test_layers_of_an_unknown_type_are_named_where_they_were_asked_for(make_trainer):
    def module():
        return Classifier(nn.Sequential(nn.Flatten(), Conv1D(192), Conv1D(192), nn.Linear(192, 4)))

    names = r"each of 'network.1.weight', 'network.2.weight' alone: the type of its layer, Conv1D"
    with pytest.warns(UserWarning, match=names):
        run(make_trainer, GradualPrune(0.9), module())
    run(make_trainer, GradualPrune({"network.3": 0.9}), module())  # a warning would be an error


def test_two_instances_prune_what_each_is_given(make_trainer, tmp_path):
    one, two = GradualPrune({"network.0": 0.5}), GradualPrune({"network.7": 0.9}, criterion=random)
    module, _, trainer = run(make_trainer, one, callbacks=[two])
    assert zeros(module)["network.0.weight"] == round(0.5 * 216)
    assert zeros(module)["network.7.weight"] == round(0.9 * 8192)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    assert len([k for k in torch.load(tmp_path / "x.ckpt")["callbacks"] if "Prune" in k]) == 2


def test_channels_last(make_trainer):
    module = Classifier()
    module = module.to(memory_format=torch.channels_last)
    module, *_ = run(make_trainer, GradualPrune(0.9), module)
    assert zeros(module) == expected(module, 0.9)


def test_the_sparsity_is_logged_without_waiting_for_the_device(make_trainer):
    logged = []

    class Spied(Classifier):
        def log(self, name, value, **arguments):
            logged.append((name, value))
            super().log(name, value, **arguments)

    run(make_trainer, GradualPrune(0.9), Spied(), epochs=1)
    values = [value for name, value in logged if name == "sparsity"]
    assert len(values) == 6
    # of a number, Lightning would make a tensor on the GPU, whose queue has to be empty for that
    assert all(isinstance(one, torch.Tensor) and one.device.type == "cpu" for one in values)


def test_the_progress_bar_and_the_logger_see_the_sparsity(make_trainer, tmp_path):
    logger = CSVLogger(tmp_path)
    _, _, trainer = run(make_trainer, GradualPrune(0.9), logger=logger, log_every_n_steps=1)
    assert trainer.progress_bar_metrics["sparsity"] == pytest.approx(0.9, abs=1e-3)
    text = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text()
    header = text.splitlines()[0].split(",")
    for column in (
        "sparsity",
        "sparsity/target",
        "sparsity/network.0.weight",
        "threshold/network.0.weight",
    ):
        assert column in header


def test_two_callbacks_log_one_target(make_trainer, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first, second = GradualPrune({"network.0": 0.5}), GradualPrune({"network.3": 0.9}, every=2)
    logger = TensorBoardLogger(tmp_path)
    options = {"max_epochs": 2, "logger": logger, "log_every_n_steps": 1}
    module = Classifier()
    make_trainer(callbacks=[first, second], **options).fit(module, small_data(), small_data(8))
    events = EventAccumulator(logger.log_dir).Reload()
    names = ["sparsity", "sparsity/target", "sparsity/network.0.weight"]
    for name in (*names, "sparsity/network.3.weight", "threshold/network.3.weight"):
        steps = [event.step for event in events.Scalars(name)]
        assert len(steps) == len(set(steps)) > 4, name  # no step is written twice
    sizes = [module.network[i].weight.numel() for i in (0, 3)]
    expected = (0.5 * sizes[0] + 0.9 * sizes[1]) / sum(sizes)
    assert events.Scalars("sparsity/target")[-1].value == pytest.approx(expected)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"sparsity": 90}, ValueError, "did you mean 0.9"),
        ({"sparsity": 0.5, "initial": 0.6}, ValueError, "initial=0.6, sparsity=0.5"),
        ({"sparsity": {"a": 0.9, "b": 0.1}, "initial": 0.5}, ValueError, "initial=0.5"),
        ({"sparsity": {"a": 0.9}, "initial": {"a": 0.1}}, TypeError, r"initial=\{'a': 0.1\}: exp"),
        ({"sparsity": 0.5, "schedule": lambda: 1.0}, TypeError, "to one number .* 0 positional"),
        ({"sparsity": 0.5, "schedule": lambda progress: None}, TypeError, "to one number"),
        ({"sparsity": 0.5, "schedule": lambda p: torch.ones(2)}, ValueError, "to one number"),
        ({"sparsity": 0.5, "begin": 9, "end": 1}, ValueError, "begin=9, end=1"),
        ({"sparsity": 0.5, "scope": "all"}, ValueError, "scope='all'"),
        ({"sparsity": 0.5, "schedule": "cubic"}, TypeError, "schedule='cubic'"),
        ({"sparsity": 0.5, "criterion": "magnitude"}, TypeError, "criterion='magnitude'"),
        ({"sparsity": 0.5, "exclude": 3}, TypeError, "exclude=3"),
    ],
)
def test_bad_arguments_fail_at_construction(arguments, error, message):
    with pytest.raises(error, match=message):
        GradualPrune(**arguments)


def test_a_glob_that_matches_nothing_fails_before_anything_changes(make_trainer):
    module = Classifier()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=r"sparsity: 'features.*' matches no layer"):
        run(make_trainer, GradualPrune({"features*": 0.5}), module)
    assert_equal(module, before)


def test_an_optimizer_that_is_none_of_torchs_is_refused(make_trainer):
    class Optimizable:
        """All that Lightning asks for."""

        def __init__(self, parameters, **arguments):
            self.inner = torch.optim.SGD(parameters, **arguments)
            self.param_groups, self.defaults = self.inner.param_groups, self.inner.defaults
            self.state, self.step = self.inner.state, self.inner.step
            self.zero_grad, self.state_dict = self.inner.zero_grad, self.inner.state_dict
            self.load_state_dict = self.inner.load_state_dict

    with pytest.raises(TypeError, match=r"a torch\.optim\.Optimizer, and Optimizable is none"):
        run(make_trainer, GradualPrune(0.5), Classifier(optimizer=Optimizable))


@pytest.mark.parametrize("strategy", [FSDPStrategy, ModelParallelStrategy])
def test_strategies_that_shard_are_refused(make_trainer, strategy):
    trainer = make_trainer()
    trainer._accelerator_connector.strategy = strategy()
    with pytest.raises(NotImplementedError, match=f"does not support {strategy.__name__}"):
        GradualPrune(0.5).setup(trainer, Classifier(), "fit")


def test_the_other_package_of_lightning_gets_one_clear_sentence(tmp_path):
    class Module(pytorch_lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def training_step(self, batch, batch_idx):
            return self.layer(batch).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = pytorch_lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[GradualPrune(0.9)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    with pytest.raises(
        TypeError, match=r"import Trainer and LightningModule from lightning.pytorch"
    ):
        trainer.fit(Module(), DataLoader(torch.randn(8, 4)))


def test_a_run_that_is_over_keeps_its_state_when_it_is_resumed(make_trainer, tmp_path):
    prune = GradualPrune(0.9)
    _, _, trainer = run(make_trainer, prune)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    again = GradualPrune(0.9)
    trainer = make_trainer(max_epochs=3, callbacks=[again])
    trainer.fit(Classifier(), small_data(), small_data(8), ckpt_path=tmp_path / "first.ckpt")
    trainer.save_checkpoint(tmp_path / "second.ckpt")
    first, second = (
        torch.load(tmp_path / f"{name}.ckpt", weights_only=True)["callbacks"][prune.state_key]
        for name in ("first", "second")
    )
    assert first["steps"] == second["steps"]
    assert first["span"] == second["span"]
    assert first["masks"].keys() == second["masks"].keys()


def test_a_second_fit_with_nothing_left_to_train_keeps_the_state(make_trainer, tmp_path):
    prune = GradualPrune(0.9)
    module, _, trainer = run(make_trainer, prune)
    before, masks = prune.state_dict(), prune.masks
    trainer.fit(module, small_data(), small_data(8))
    assert prune.target_reached
    assert prune.masks.keys() == masks.keys()
    assert all(torch.equal(prune.masks[name], mask) for name, mask in masks.items())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)["callbacks"][prune.state_key]
    assert saved["steps"] == before["steps"]
    resumed = make_trainer(max_epochs=4, callbacks=[GradualPrune(0.9)])
    resumed.fit(Classifier(), small_data(), small_data(8), ckpt_path=tmp_path / "x.ckpt")


def test_a_callback_that_served_another_run_begins_anew(make_trainer, tmp_path):
    prune = GradualPrune(0.9)
    module, watch, trainer = run(make_trainer, prune)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    trainer.test(module, small_data(8), ckpt_path=tmp_path / "x.ckpt", verbose=False)
    _, again, _ = run(make_trainer, prune)
    assert again.history == watch.history
    finder = LearningRateFinder(num_training_steps=5)
    _, third, _ = run(make_trainer, prune, LearningRate(), callbacks=[finder])
    assert third.history == watch.history


def test_a_resume_that_fails_leaves_nothing_to_the_next_run(make_trainer, tmp_path):
    prune = GradualPrune(0.9)
    _, watch, trainer = run(make_trainer, prune)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    other = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)))
    with pytest.raises(RuntimeError, match="size mismatch"):
        make_trainer(max_epochs=3, callbacks=[prune]).fit(
            other, small_data(), small_data(8), ckpt_path=tmp_path / "x.ckpt"
        )
    _, again, _ = run(make_trainer, prune)
    assert again.history == watch.history


@pytest.mark.parametrize("begin", [0, 10])
@pytest.mark.parametrize("lowrank_first", [True, False])
def test_a_criterion_that_is_none_is_found_before_the_first_step(
    make_trainer, begin, lowrank_first
):
    def flat(parameter):
        return parameter.abs().flatten()

    module = Classifier()
    before = copy.deepcopy(module)
    callbacks = [GradualPrune(0.9, begin=begin, end=15, every=1, criterion=flat), LowRank(r=4)]
    trainer = make_trainer(max_epochs=3, callbacks=callbacks[:: -1 if lowrank_first else 1])
    with pytest.raises(ValueError, match="expected scores of the shape of"):
        trainer.fit(module, small_data(), small_data(8))
    assert str(module) == str(before)
    parameters = zip(module.parameters(), before.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in parameters)


@pytest.mark.parametrize(("initial", "final"), [(0.1, 0.45), (0.15, 0.45), (0.3, 0.9)])
def test_rounding_does_not_keep_the_end_from_being_the_target(make_trainer, initial, final):
    module = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(192, 5), nn.Linear(5, 6)))
    prune = GradualPrune(final, initial=initial)
    module, *_ = run(make_trainer, prune, module)
    assert zeros(module) == expected(module, final)
    assert prune.target_reached


def test_what_becomes_of_the_callers_mapping_is_no_matter(make_trainer):
    sparsity = {"network.0": np.float64(0.5)}
    prune = GradualPrune(sparsity)
    sparsity.clear()
    run(make_trainer, prune)
    assert list(prune.masks) == ["network.0.weight"]
    assert repr(prune.sparsity) == "{'network.0': 0.5}"


def test_two_instances_on_one_layer_are_refused(make_trainer):
    one, two = GradualPrune({"network.*": 0.5}), GradualPrune({"network.7": 0.5})
    with pytest.raises(
        ValueError, match=r"two GradualPrune callbacks prune \['network.7.weight'\]"
    ):
        run(make_trainer, one, callbacks=[two])


def test_the_logged_target_is_weighted_as_the_sparsity_is(make_trainer, tmp_path):
    logger = CSVLogger(tmp_path)
    prune = GradualPrune({"network.0": 0.1, "network.7": 0.9})
    run(make_trainer, prune, logger=logger, log_every_n_steps=1)
    text = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text()
    rows = list(csv.DictReader(text.splitlines()))
    last = {key: [row[key] for row in rows if row[key]][-1] for key in rows[0]}
    expected = (round(0.1 * 216) + round(0.9 * 8192)) / (216 + 8192)
    assert float(last["sparsity/target"]) == pytest.approx(expected, abs=1e-3)
    assert float(last["sparsity"]) == pytest.approx(expected, abs=1e-6)


class KeepHead:
    """A predicate that is an object, another one in every process."""

    def __call__(self, name, layer):
        return name.endswith("9")


def test_objects_as_arguments_are_the_same_in_every_process():
    one, two = (
        GradualPrune(0.5, exclude=KeepHead(), schedule=partial(pow, exp=2)) for _ in range(2)
    )
    assert one.state_key == two.state_key
    assert one._arguments() == two._arguments()
