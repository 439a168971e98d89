"""LowRank on the real Trainer: what it changes, when, and what it refuses."""

import copy
import io

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import slimnets
from slimnets.distillation import DistillationModule
from slimnets.lowrank import LowRank, LowRankPair, LowRankReplace
from tests.support import Backbone, Classifier, Gan, assert_equal, ranks, small_data, small_network


class Fails(Callback):
    """Raises in one of its hooks."""

    def __init__(self, hook):
        def fail(*args, **kwargs):
            raise RuntimeError("broken elsewhere")

        setattr(self, hook, fail)


def fit(make_trainer, module, callbacks, **arguments):
    trainer = make_trainer(**{"max_epochs": 1, "callbacks": callbacks, **arguments})
    trainer.fit(module, small_data(), small_data(8))
    return trainer


def test_the_alias_is_the_same_class():
    assert LowRankReplace is LowRank is slimnets.LowRank is slimnets.LowRankReplace


def test_layers_are_replaced_and_their_factors_trained(make_trainer):
    module = Classifier()
    dense = copy.deepcopy(module.state_dict())
    seen = []

    class Look(Callback):
        def on_train_start(self, trainer, pl_module):
            seen.append(copy.deepcopy(pl_module.network))
            optimized = {id(p) for g in trainer.optimizers[0].param_groups for p in g["params"]}
            assert optimized == {id(p) for p in pl_module.parameters()}

    fit(make_trainer, module, [LowRank(2), Look()])
    assert ranks(module) == {"network.0": 2, "network.3": 2, "network.7": 2, "network.9": 2}
    assert torch.equal(seen[0][9].bias, dense["network.9.bias"])
    u, s, vh = torch.linalg.svd(dense["network.7.weight"])
    best = (u[:, :2] * s[:2]) @ vh[:2]
    torch.testing.assert_close(seen[0][7].weight, best, rtol=0, atol=1e-5)
    for name, before in seen[0].state_dict().items():
        if before.is_floating_point() and "bias" not in name:
            assert not torch.equal(before, module.network.state_dict()[name]), name


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"r": 0.25}, {"0": 2, "3": 6, "7": 8, "9": 1}),
        ({"r": {"[37]": 3, "*": 1}}, {"0": 1, "3": 3, "7": 3, "9": 1}),
        ({"r": {"7": 0.5}}, {"7": 16}),
        ({"r": 2, "exclude": nn.Linear}, {"0": 2, "3": 2}),
        ({"r": 2, "decomposition": "channel", "exclude": ["7", "9"]}, {"0": 2, "3": 2}),
    ],
)
def test_names_are_those_of_the_compressed_network(make_trainer, arguments, expected):
    student = small_network()
    module = DistillationModule(student=student, teacher=small_network())
    fit(make_trainer, module, [LowRank(**arguments)])
    assert ranks(student) == expected
    assert not ranks(module.teacher)
    if arguments.get("decomposition") == "channel":
        assert student[0].first.kernel_size == (3, 3)


def test_a_student_that_is_itself_a_layer(make_trainer):
    module = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)))
    fit(make_trainer, module, [LowRank({"network.1": 1})])
    assert ranks(module) == {"network.1": 1}

    class Wrapper(Classifier):
        @property
        def compressed_network(self):
            return self.network

        def forward(self, x):
            return self.network(x.flatten(1))

    module = Wrapper(nn.Linear(192, 4))
    trainer = fit(make_trainer, module, [LowRank(2)])
    assert ranks(module) == {"network": 2}
    trainer.test(module, small_data(8), verbose=False)


def test_a_compiled_network_inside_the_module(make_trainer):
    module = Classifier(torch.compile(small_network(), backend="eager"))
    fit(make_trainer, module, [LowRank(2, exclude="*9")])
    assert set(ranks(module)) == {f"network._orig_mod.{i}" for i in (0, 3, 7)}


def test_a_second_fit_and_every_stage_leave_the_pairs(make_trainer):
    module = Classifier()
    callback = LowRank({"network.[37]": 3})
    trainer = fit(make_trainer, module, [callback])
    layers = list(module.modules())
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, small_data(), small_data(8))
    for stage in (trainer.validate, trainer.test):
        stage(module, small_data(8), verbose=False)
    trainer.predict(module, small_data(8))
    again = LowRank(2, exclude=["network.0", "network.9"])
    with pytest.warns(UserWarning, match=r"leaves 'network.3' \(already a pair of rank 3, not 2"):
        fit(make_trainer, module, [again])
    assert list(module.modules()) == layers


def test_evaluation_without_a_checkpoint_is_of_the_network_as_it_is(make_trainer):
    module = Classifier()
    layers = list(module.modules())
    trainer = make_trainer(callbacks=[LowRank(2)])
    trainer.validate(module, small_data(8), verbose=False)
    trainer.test(module, small_data(8), verbose=False)
    trainer.predict(module, small_data(8))
    assert list(module.modules()) == layers


def test_nothing_is_left_on_the_module_but_pairs(make_trainer):
    module = Classifier()
    trainer = fit(make_trainer, module, [LowRank(2)])
    trainer.test(module, small_data(8), verbose=False)
    assert not module._load_state_dict_pre_hooks
    with pytest.raises(RuntimeError, match="Missing key"):
        module.load_state_dict(Classifier().state_dict())


def test_the_module_is_saved_and_copied_while_it_trains(make_trainer):
    class Save(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            file = io.BytesIO()
            torch.save(pl_module, file)
            file.seek(0)
            self.saved = torch.load(file, weights_only=False)
            self.copied = copy.deepcopy(pl_module)

    save = Save()
    module = Classifier()
    fit(make_trainer, module, [LowRank(2), save], max_steps=2)
    images = torch.randn(2, 3, 8, 8)
    module.eval()
    for other in (save.saved, save.copied):
        assert torch.equal(other.eval()(images), module(images))


def test_configure_model_is_called_first(make_trainer):
    class Late(Classifier):
        def configure_model(self):
            if isinstance(self.network, nn.Identity):
                self.network = small_network()

    module = Late(nn.Identity())
    fit(make_trainer, module, [LowRank(2)])
    assert len(ranks(module)) == 4


class BuiltInSetup(Classifier):
    """Builds a head, or everything, in its own setup."""

    def __init__(self, everything):
        super().__init__(nn.Identity() if everything else small_network())
        self.everything = everything

    def setup(self, stage):
        if self.everything:
            self.network = small_network()
        else:
            self.network.append(nn.Linear(4, 4))


class ReplacedInSetup(Classifier):
    """Its last layer is gone after ``setup``."""

    def setup(self, stage):
        self.network[9] = nn.Identity()


def test_layers_that_the_module_takes_away_in_setup_are_an_error(make_trainer):
    with pytest.raises(ValueError, match=r"missed .*: network.9; build them in __init__"):
        make_trainer(max_epochs=1, callbacks=[LowRank(2)]).fit(
            ReplacedInSetup(), small_data(), small_data(8)
        )


@pytest.mark.parametrize("everything", [True, False])
def test_layers_that_the_module_builds_in_setup_are_an_error(make_trainer, everything):
    module = BuiltInSetup(everything)
    message = "build them in __init__" if everything else "missed .*: network.10; build them in"
    with pytest.raises(ValueError, match=message):
        fit(make_trainer, module, [LowRank(2)])
    assert not ranks(module)


class Loads(Callback):
    """Loads weights in one of the hooks."""

    def __init__(self, hook, state):
        setattr(self, hook, lambda trainer, pl_module, **_: pl_module.load_state_dict(state))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    ("hook", "message"),
    [
        ("setup", "made dense again by weights that were loaded, after it ran: network.0, "),
        ("on_fit_start", "were loaded"),
    ],
)
def test_dense_weights_that_are_loaded_after_it_ran_are_an_error(
    make_trainer, hook, message, first
):
    module, dense = Classifier(), Classifier().state_dict()
    callbacks = [Loads(hook, dense), LowRank(2)]
    if hook == "setup" and first:
        fit(make_trainer, module, callbacks)  # they are what is factorized
        assert ranks(module)
        return
    with pytest.raises(ValueError, match=message):
        fit(make_trainer, module, callbacks[:: 1 if first else -1])
    assert not ranks(module)


def test_other_weights_that_are_loaded_into_a_resumed_run_are_an_error(make_trainer, tmp_path):
    callbacks = [LowRank(2)]
    fit(make_trainer, Classifier(), callbacks).save_checkpoint(tmp_path / "x.ckpt")
    callbacks += [Loads("on_fit_start", Classifier().state_dict())]
    with pytest.raises(ValueError, match=r"loaded into network\.0, .* after SGD was made"):
        trainer = make_trainer(max_epochs=2, callbacks=callbacks)
        trainer.fit(Classifier(), small_data(), small_data(8), ckpt_path=tmp_path / "x.ckpt")


def test_a_configure_model_that_builds_twice_is_an_error(make_trainer):
    class Twice(Classifier):
        def configure_model(self):
            self.network = small_network()

    with pytest.raises(ValueError, match="once only in configure_model"):
        fit(make_trainer, Twice(), [LowRank(2)])


def test_when_nothing_is_replaced_it_warns(make_trainer):
    with pytest.warns(UserWarning, match=r"LowRank replaces no layer:(.|\n)*not below its full"):
        fit(make_trainer, Classifier(), [LowRank(1000)], max_steps=1)


def test_sharding_is_refused(make_trainer):
    trainer = make_trainer()
    trainer._accelerator_connector.strategy = FSDPStrategy()
    module = Classifier()
    with pytest.raises(NotImplementedError, match="LowRank does not support FSDPStrategy"):
        LowRank(2).setup(trainer, module, "fit")
    assert not ranks(module)


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork", "ddp_notebook"])
def test_processes_that_are_spawned_or_forked_are_refused(make_trainer, strategy):
    module = Classifier()
    trainer = make_trainer(strategy=strategy, devices=2)
    with pytest.raises(NotImplementedError, match="use strategy='ddp' or a single device"):
        LowRank(2).setup(trainer, module, "fit")
    assert not ranks(module)
    assert not module._load_state_dict_pre_hooks
    LowRank(2).setup(trainer, module, "test")  # which brings nothing back


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "give exactly one"),
        ({"r": -3}, ValueError, "r=-3: expected a rank of at least 1"),
        ({"r": "4"}, TypeError, "r='4': expected"),
        ({"energy": 90}, ValueError, r"energy=90: .* did you mean 0\.9"),
        ({"r": 2, "decomposition": "cp"}, ValueError, "decomposition='cp'"),
        ({"r": 2, "exclude": 7}, TypeError, "exclude=7"),
    ],
)
def test_bad_arguments_are_refused_at_construction(arguments, error, message):
    with pytest.raises(error, match=message):
        LowRank(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"r": {"nope": 2}}, "r: 'nope' matches no layer; the layers are: 'network.0'"),
        ({"r": 2, "exclude": nn.Conv3d}, "exclude: Conv3d matches no layer"),
    ],
)
def test_globs_that_match_nothing_are_refused_before_any_change(make_trainer, arguments, message):
    module = Classifier()
    layers = list(module.modules())
    with pytest.raises(ValueError, match=message):
        fit(make_trainer, module, [LowRank(**arguments)])
    assert list(module.modules()) == layers
    assert not module._load_state_dict_pre_hooks


def test_weights_that_are_not_finite_are_refused(make_trainer):
    module = Classifier()
    module.network[7].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"weight of layer 'network\.7' has infinite or NaN"):
        fit(make_trainer, module, [LowRank(2)])
    assert not ranks(module)


@pytest.mark.parametrize(
    "hook",
    [
        "setup",
        "on_fit_start",
        "on_sanity_check_start",
        "on_train_start",
        "on_train_batch_start",
        "on_before_backward",
        "on_before_optimizer_step",
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_an_error_before_the_first_step_puts_the_layers_back(make_trainer, hook, first):
    module = Classifier()
    layers, state = list(module.modules()), copy.deepcopy(module.state_dict())
    callbacks = [Fails(hook), LowRank(2)] if first else [LowRank(2), Fails(hook)]
    with pytest.raises(RuntimeError, match="broken elsewhere"):
        fit(make_trainer, module, callbacks, num_sanity_val_steps=1)
    assert list(module.modules()) == layers
    weights = {name: value for name, value in state.items() if name.endswith(("weight", "bias"))}
    assert all(torch.equal(module.state_dict()[name], value) for name, value in weights.items())
    assert not module._load_state_dict_pre_hooks
    fit(make_trainer, module, [LowRank(2)])
    assert len(ranks(module)) == 4


def test_an_error_in_the_first_batch_puts_the_layers_back(make_trainer):
    module = Classifier()
    layers = list(module.modules())
    trainer = make_trainer(max_epochs=1, callbacks=[LowRank(2)])
    with pytest.raises(RuntimeError, match="5 channels"):
        wrong = TensorDataset(torch.randn(2, 5, 8, 8), torch.zeros(2).long())
        trainer.fit(module, DataLoader(wrong), small_data(8))
    assert list(module.modules()) == layers


@pytest.mark.parametrize("order", [1, -1])
def test_an_error_after_the_first_step_keeps_what_was_learned(make_trainer, order):
    module = Classifier()
    callbacks = [LowRank(2), Fails("on_train_batch_end")][::order]
    with pytest.raises(RuntimeError, match="broken elsewhere"):
        fit(make_trainer, module, callbacks)
    assert len(ranks(module)) == 4
    assert not module._load_state_dict_pre_hooks


def test_layers_that_are_put_back_have_the_precision_of_the_rest(make_trainer):
    module = Classifier()
    with pytest.raises(RuntimeError, match="broken elsewhere"):
        fit(make_trainer, module, [LowRank(2), Fails("on_train_start")], precision="bf16-true")
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_lower_precision(make_trainer, precision):
    module = Classifier()
    weight = module.network[7].weight.detach().clone()
    u, s, vh = torch.linalg.svd(weight)
    seen = []

    class Look(Callback):
        def on_train_start(self, trainer, pl_module):
            seen.append(pl_module.network[7].weight.detach().float())

    fit(make_trainer, module, [LowRank(2), Look()], precision=precision)
    tolerance = 5e-3 if precision == "bf16-true" else 1e-5  # the decomposition is in float32
    torch.testing.assert_close(seen[0], (u[:, :2] * s[:2]) @ vh[:2], rtol=0, atol=tolerance)


def test_layers_that_are_frozen_stay_frozen_until_finetuning_unfreezes_them(make_trainer):
    class Look(Callback):
        frozen = ()

        def on_train_epoch_end(self, trainer, pl_module):
            conv = pl_module.backbone[3]
            self.frozen += (not any(p.requires_grad for p in conv.parameters()),)

    look = Look()
    finetuning = BackboneFinetuning(1, verbose=False, train_bn=False)
    for order in ([LowRank(2), finetuning, look], [finetuning, LowRank(2), look]):
        module = Backbone()
        look.frozen = ()
        fit(make_trainer, module, order, max_epochs=2)
        assert look.frozen == (True, False)
        assert isinstance(module.backbone[3], LowRankPair)


def test_layers_that_are_still_lazy_are_left(make_trainer):
    lazy = nn.Sequential(nn.Flatten(), nn.Linear(192, 64), nn.ReLU(), nn.LazyLinear(4))
    module = Classifier(lazy)
    fit(make_trainer, module, [LowRank(2)])
    assert isinstance(module.network[1], LowRankPair)
    assert type(module.network[3]) is nn.Linear


def test_ranks_and_sizes_are_logged(make_trainer, tmp_path):
    module = Classifier()
    weights = sum(p.numel() for p in module.parameters())
    logger = CSVLogger(tmp_path)
    fit(make_trainer, module, [LowRank({"network.7": 4})], logger=logger, log_every_n_steps=1)
    header, first = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().split("\n")[:2]
    found = dict(zip(header.split(","), first.split(","), strict=True))
    assert float(found["rank/network.7"]) == 4
    assert float(found["parameters/before"]) == weights
    assert float(found["parameters/after"]) == sum(p.numel() for p in module.parameters())
    assert float(found["step"]) == 0


def test_the_summary_is_written_once_at_the_end(make_trainer, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    callbacks = [LowRank({"network.7": 4}), LowRank({"network.3": 4})]
    fit(make_trainer, Classifier(), callbacks, logger=logger, log_every_n_steps=1)
    events = EventAccumulator(logger.log_dir).Reload()
    assert len(events.Tags()["tensors"]) == 1  # the text
    assert {"rank/network.7", "rank/network.3"} <= set(events.Tags()["scalars"])


def test_what_is_done_and_left_is_said(make_trainer, caplog):
    network = small_network()
    network.insert(5, nn.Conv2d(16, 16, 3, padding=1, groups=16))
    with caplog.at_level("INFO"):
        fit(make_trainer, Classifier(network), [LowRank(2, exclude="network.0")], max_steps=1)
    said = next(text for text in caplog.messages if "LowRank" in text)
    assert "LowRank replaces 3 of 5 layers, " in said
    assert "left 'network.5': it is grouped (groups=16)" in said
    assert "network.0" not in said


def test_two_instances_on_one_trainer(make_trainer):
    module = Classifier()
    callbacks = [
        LowRank({"network.[03]": 2}, decomposition="channel"),
        LowRank(energy=0.5, exclude="network.[03]"),
    ]
    assert callbacks[0].state_key != callbacks[1].state_key
    fit(make_trainer, module, callbacks)
    assert module.network[0].first.kernel_size == (3, 3)
    assert {"network.0", "network.3", "network.7"} <= set(ranks(module))


def test_the_state_key_does_not_change_with_ranks():
    assert LowRank(2).state_key == LowRank(4).state_key == LowRank(energy=0.5).state_key
    assert LowRank({"a": 2}).state_key == LowRank({"a": 4}).state_key


def test_manual_optimization_with_two_optimizers(make_trainer):
    module = Gan()
    fit(make_trainer, module, [LowRank(1)])
    assert ranks(module)["critic"] == 1
    with pytest.raises(RuntimeError, match="broken"):
        fit(make_trainer, module, [LowRank(1), Fails("on_train_batch_end")])
    assert ranks(module)["critic"] == 1


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")  # what barebones is for
def test_fast_dev_run_and_barebones(make_trainer):
    for arguments in ({"fast_dev_run": True}, {"barebones": True, "max_steps": 1}):
        module = Classifier()
        defaults = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar"], None)
        trainer = make_trainer(callbacks=[LowRank(2)], **{**defaults, **arguments})
        trainer.fit(module, small_data(), small_data(8))
        assert len(ranks(module)) == 4


def test_the_learning_rate_finder(make_trainer):
    module = Classifier()
    module.lr = 0.1
    trainer = make_trainer(max_epochs=1, callbacks=[LowRank(2)])
    tuner = L.pytorch.tuner.Tuner(trainer)
    tuner.lr_find(module, small_data(), small_data(8), num_training=5)
    trainer.fit(module, small_data(), small_data(8))
    assert len(ranks(module)) == 4


@pytest.mark.parametrize("arguments", [{}, {"at": 2}])
def test_dense_weights_cannot_be_loaded_beneath_the_optimizers(make_trainer, arguments):
    dense = Classifier().state_dict()

    class Load(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            if trainer.global_step == 4:
                pl_module.load_state_dict(dense)

    with pytest.raises(RuntimeError, match=r"Missing key.*network.0.first.weight"):
        fit(make_trainer, Classifier(), [LowRank(2, **arguments), Load()])


class Held(Classifier):
    """Its optimizer is made before any callback runs."""

    def __init__(self):
        super().__init__()
        self.held = super().configure_optimizers()

    def configure_optimizers(self):
        return self.held


def test_an_optimizer_of_the_layers_before_is_refused(make_trainer):
    module = Held()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=r"replaced network\.0, .*, but SGD would go on"):
        fit(make_trainer, module, [LowRank(r=2)])
    assert not ranks(module)
    assert_equal(module, before)
    fit(make_trainer, module, [LowRank(r=2, at=3)])  # which knows what the optimizer has
    assert ranks(module)
