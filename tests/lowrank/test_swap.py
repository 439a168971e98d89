"""LowRank(at=...): layers replaced in the middle of a run."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import (
    Callback,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import nn
from torch.utils.data import DataLoader

from slimnets import DistillationModule, ExactResume, after_target
from slimnets.lowrank import LowRank, LowRankPair, factorize
from slimnets.lowrank.pair import make_pair
from slimnets.lowrank.swap import successors, take_over
from slimnets.trainer import averaged_networks
from tests.support import (
    CalledModule,
    Classifier,
    Endless,
    Gan,
    Save,
    assert_equal,
    ranks,
    small_data,
    small_network,
)

# checkpoints lie where the test wants them
pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:Swapping scheduler"),
]
ADAM = partial(torch.optim.Adam, lr=0.01)
STEPS = 6  # of an epoch


def classifier(optimizer=ADAM, seed=0, network=None):
    torch.manual_seed(seed)
    return Classifier(network or small_network(norm=False), lambda p, **_: optimizer(p))


def run(make_trainer, module, callbacks, epochs=3, ckpt_path=None, **arguments):
    trainer = make_trainer(max_epochs=epochs, callbacks=[*callbacks, ExactResume()], **arguments)
    # SWA keeps its scheduler, which torch 2.6 does not take for mere weights
    trainer.fit(
        module, small_data(shuffle=True), small_data(8), ckpt_path=ckpt_path, weights_only=False
    )
    return trainer


class Record(Callback):
    """What there is before and after every step."""

    def __init__(self):
        self.before, self.after = [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.before.append(ranks(pl_module))

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.after.append(copy.deepcopy(pl_module.state_dict()))
        live = {id(p) for o in trainer.optimizers for g in o.param_groups for p in g["params"]}
        assert live == {id(p) for p in pl_module.parameters()}
        assert set(map(id, trainer.optimizers[0].state)) <= live
        for network in averaged_networks(trainer):
            assert ranks(network) == ranks(pl_module)


@pytest.mark.parametrize(("at", "step"), [(1, 1), (np.int64(7), 7), (0.5, 9), (0.01, 1)])
def test_the_layers_are_replaced_after_that_many_steps(make_trainer, at, step):
    record, module = Record(), classifier()
    run(make_trainer, module, [LowRank(2, at=at), record])
    assert [bool(found) for found in record.before] == [False] * step + [True] * (18 - step)
    assert len(ranks(module)) == 4


def test_until_then_it_is_the_dense_run_and_then_the_pairs_of_its_weights_are_trained(make_trainer):
    dense, record = Record(), Record()
    run(make_trainer, classifier(), [dense])
    module = classifier()
    run(make_trainer, module, [LowRank(2, at=7), record])
    for found, expected in zip(record.after[:7], dense.after[:7], strict=True):
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    start = classifier()
    start.load_state_dict(dense.after[6])
    factorize(start, 2)
    for name, value in start.state_dict().items():
        change = (record.after[7][name] - value).abs().max()
        assert 0 < change <= 0.0101  # one step of Adam


OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": ADAM,
    "adamw": partial(torch.optim.AdamW, lr=0.01, amsgrad=True),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.01, momentum=0.5),
    "adafactor": partial(torch.optim.Adafactor, lr=0.01),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("saved", [1, 2])
def test_a_resumed_run_ends_like_one_that_was_not_interrupted(
    make_trainer, tmp_path, optimizer, saved
):
    whole = classifier(optimizer)
    run(make_trainer, whole, [LowRank(energy=0.7, at=0.5), Save(tmp_path)])
    resumed = classifier(optimizer, seed=1)
    path = tmp_path / f"{saved * STEPS}.ckpt"
    run(make_trainer, resumed, [LowRank(energy=0.7, at=0.5)], ckpt_path=path)
    assert ranks(resumed) == ranks(whole) != {}
    assert_equal(resumed, whole)


def test_a_checkpoint_of_the_very_step_is_from_before(make_trainer, tmp_path):
    whole, resumed = classifier(), classifier(seed=1)
    keep = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_epochs=1, filename="{epoch}")
    run(make_trainer, whole, [LowRank(2, at=STEPS), keep], enable_checkpointing=True)
    state = torch.load(tmp_path / "epoch=0.ckpt")["state_dict"]
    assert "network.7.weight" in state
    resumed_run = [LowRank(2, at=STEPS)]
    run(make_trainer, resumed, resumed_run, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert_equal(resumed, whole)


def test_state_goes_on_where_it_can_and_starts_afresh_elsewhere():
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    optimizer = torch.optim.Adam(
        [{"params": [net[0].weight, net[1].weight]}, {"params": [net[0].bias, net[1].bias]}]
    )
    net(torch.randn(4, 8)).sum().backward()
    optimizer.step()
    before = dict(optimizer.state)
    layer = net[0]
    net[0] = make_pair(layer, 2)
    take_over(optimizer, successors(layer, net[0]))
    first, second = optimizer.param_groups
    assert list(map(id, first["params"])) == [
        id(p) for p in (net[0].first.weight, net[0].second.weight, net[1].weight)
    ]
    assert list(map(id, second["params"])) == [id(net[0].second.bias), id(net[1].bias)]
    assert optimizer.state[net[0].second.bias] is before[layer.bias]
    assert optimizer.state[net[1].weight] is before[net[1].weight]
    assert set(optimizer.state) == {net[0].second.bias, net[1].weight, net[1].bias}
    net(torch.randn(4, 8)).sum().backward()
    optimizer.step()
    assert float(optimizer.state[net[0].first.weight]["step"]) == 1
    assert float(optimizer.state[net[0].second.bias]["step"]) == 2


def test_names_of_parameters_in_groups_follow():
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8, bias=False))
    optimizer = torch.optim.SGD(list(net.named_parameters()), lr=0.1)
    layer = net[0]
    net[0] = make_pair(layer, 2)
    take_over(optimizer, successors(layer, net[0]))
    assert optimizer.param_groups[0]["param_names"] == [n for n, _ in net.named_parameters()]


def test_frozen_weights_that_no_optimizer_has_stay_out_of_it():
    layer = nn.Linear(8, 8).requires_grad_(False)
    other = nn.Linear(8, 8)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    take_over(optimizer, successors(layer, make_pair(layer, 2)))
    assert len(optimizer.param_groups[0]["params"]) == 2


class MeanTeacher(Classifier):
    """Averages its network itself, if it is asked to."""

    def __init__(self, averages, frozen):
        super().__init__(small_network(norm=False))
        self.averages = averages
        self.teacher = copy.deepcopy(self.network).requires_grad_(not frozen)

    def on_train_batch_end(self, *_):
        for own, average in zip(self.network.parameters(), self.teacher.parameters(), strict=True):
            if self.averages:  # in the way of MoCo's code
                average.data = average.data * 0.9 + own.data * 0.1

    def configure_optimizers(self):
        return torch.optim.SGD(self.network.parameters(), lr=0.1)


@pytest.mark.parametrize("frozen", [True, False])
def test_an_average_of_the_modules_own_is_named(make_trainer, frozen):
    def fit(averages):
        trainer = make_trainer(max_epochs=1, callbacks=[LowRank(2, at=0.5)])
        trainer.fit(MeanTeacher(averages, frozen), small_data(), small_data(8))

    with pytest.warns(UserWarning, match=r"replaces 'teacher\.0', .*WeightAveraging"):
        fit(averages=True)
    fit(averages=False)  # a warning would be an error


def test_schedulers_go_on(make_trainer):
    class Scheduled(Classifier):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 18)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    class Rates(Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_end(self, trainer, pl_module, *args):
            self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    rates = [Rates(), Rates()]
    run(make_trainer, Scheduled(), [rates[0]])
    module = Scheduled()
    run(make_trainer, module, [LowRank(2, at=9), rates[1], Record()])
    assert rates[0].seen == rates[1].seen
    assert len(ranks(module)) == 4


AVERAGES = {
    "ema": lambda: EMAWeightAveraging(decay=0.8),
    "mean": WeightAveraging,
    "swa": lambda: StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1, annealing_epochs=1),
}


def test_an_average_of_a_module_that_has_one_called_module(make_trainer):
    module = CalledModule()
    swa = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1, annealing_epochs=1)
    make_trainer(max_epochs=3, callbacks=[LowRank(2, at=9), swa]).fit(
        module, small_data(), small_data(8)
    )
    assert isinstance(module.module[3], LowRankPair)


@pytest.mark.parametrize("average", AVERAGES.values(), ids=AVERAGES)
@pytest.mark.parametrize("at", [5, 9])
def test_averages_follow_in_both_orders_and_resume(make_trainer, tmp_path, average, at):
    results = []
    for order in (1, -1):
        callbacks = [LowRank(2, at=at), average()][::order]
        module = classifier()
        run(make_trainer, module, [*callbacks, Record(), Save(tmp_path)])
        results.append(module)
        resumed = classifier(seed=1)
        callbacks = [LowRank(2, at=at), average()][::order]
        run(make_trainer, resumed, [*callbacks, Record()], ckpt_path=tmp_path / f"{STEPS}.ckpt")
        assert_equal(resumed, module)
    assert_equal(*results)
    assert len(ranks(module)) == 4


def test_the_average_is_that_of_the_pair_since_the_swap(make_trainer):
    class Average(Callback):
        def on_train_end(self, trainer, pl_module):
            (network,) = averaged_networks(trainer)
            self.found = copy.deepcopy(network.state_dict())

    record, average = Record(), Average()
    callbacks = [LowRank(2, at=15), EMAWeightAveraging(decay=0.5), record, average]
    run(make_trainer, classifier(), callbacks)
    name = "network.7.first.weight"
    expected = record.after[15][name]
    for state in record.after[16:]:
        expected = 0.5 * expected + 0.5 * state[name]
    torch.testing.assert_close(average.found[name], expected, rtol=0, atol=1e-6)


def test_gradient_accumulation(make_trainer):
    record, module = Record(), classifier()
    run(make_trainer, module, [LowRank(2, at=4), record], accumulate_grad_batches=2)
    assert [bool(found) for found in record.before] == [False] * 4 + [True] * 5


def test_the_student_of_a_distillation(make_trainer):
    student = small_network()
    module = DistillationModule(student=student, teacher=small_network())
    run(make_trainer, module, [LowRank(2, at=5)])
    assert len(ranks(student)) == 4


def test_manual_optimization_with_two_optimizers(make_trainer):
    module, record = Gan(), Record()
    run(make_trainer, module, [LowRank(1, at=10), record])
    assert [bool(found) for found in record.before] == [False] * 10 + [True] * 26
    assert "critic" in ranks(module)
    with pytest.raises(ValueError, match=r"at=0\.5 is a fraction .* not known"):
        run(make_trainer, Gan(), [LowRank(1, at=0.5)])


def test_a_loader_without_length(make_trainer):
    for arguments, at, error in (
        ({"max_steps": 8}, 0.5, None),
        ({"limit_train_batches": 8}, 0.5, None),
        ({"max_time": "00:00:00:02"}, 0.5, "not known"),
        ({"max_time": "00:00:00:02", "max_steps": 8}, 4, None),
    ):
        module, record = classifier(), Record()
        trainer = make_trainer(
            **{"max_epochs": 1, **arguments}, callbacks=[LowRank(2, at=at), record]
        )
        if error:
            with pytest.raises(ValueError, match=error):
                trainer.fit(module, DataLoader(Endless(), 4), small_data(8))
        else:
            trainer.fit(module, DataLoader(Endless(), 4), small_data(8))
            assert [bool(found) for found in record.before] == [False] * 4 + [True] * 4


BAD = {
    "zero": (0, ValueError, "at=0: expected an int of at least 1"),
    "negative": (-3, ValueError, "at=-3: expected"),
    "bool": (True, TypeError, "at=True: expected"),
    "string": ("5", TypeError, "at='5': expected"),
    "one": (1.0, ValueError, r"at=1\.0: expected"),
    "steps": (500.0, ValueError, r"at=500\.0: expected .* did you mean 500\?"),
    "nan": (float("nan"), ValueError, "at=nan: expected"),
}


@pytest.mark.parametrize(("at", "error", "message"), BAD.values(), ids=BAD)
def test_bad_arguments(at, error, message):
    with pytest.raises(error, match=message):
        LowRank(2, at=at)


def test_a_run_that_ends_before_is_refused(make_trainer):
    module = classifier()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=r"at=18: the run has only 18 optimizer steps"):
        run(make_trainer, module, [LowRank(2, at=18)])
    assert_equal(module, before)


def test_a_run_that_stops_early_says_so(make_trainer):
    class Stop(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = True

    with pytest.warns(UserWarning, match="stopped after 6 .* before the layers .* at step 9"):
        run(make_trainer, classifier(), [LowRank(2, at=0.5), Stop()])


def test_globs_are_checked_at_the_start(make_trainer):
    with pytest.raises(ValueError, match="'nope' matches no layer"):
        run(make_trainer, classifier(), [LowRank({"nope": 2}, at=9)])


def test_fast_dev_run_swaps_too(make_trainer):
    module = classifier()
    trainer = make_trainer(fast_dev_run=2, callbacks=[LowRank(2, at=500)])
    trainer.fit(module, small_data(), small_data(8))
    assert len(ranks(module)) == 4


def test_strategies_of_several_processes_are_refused(make_trainer):
    module = classifier()
    with pytest.raises(NotImplementedError, match=r"LowRank\(at=9\) does not support DDPStrategy"):
        run(make_trainer, module, [LowRank(2, at=9)], strategy="ddp")
    torch.distributed.destroy_process_group()  # Lightning leaves it to the end of the process
    assert not ranks(module)


def test_two_instances_replace_at_different_steps(make_trainer):
    module = classifier()
    run(make_trainer, module, [LowRank({"*.7": 2}, at=9), LowRank({"*.[03]": 2})])
    assert set(ranks(module)) == {"network.0", "network.3", "network.7"}


def test_lbfgs_is_refused(make_trainer):
    with pytest.raises(ValueError, match="at=9: LBFGS keeps one state"):
        run(make_trainer, classifier(torch.optim.LBFGS), [LowRank(2, at=9)])


def test_choosing_the_best_can_wait_for_it(make_trainer, tmp_path):
    best = after_target(ModelCheckpoint(tmp_path, monitor="val_loss", filename="best"))
    module = classifier()
    run(make_trainer, module, [LowRank(2, at=7), best], enable_checkpointing=True)
    state = torch.load(best.best_model_path)["state_dict"]
    assert "network.7.first.weight" in state


def test_resuming_with_another_at(make_trainer, tmp_path):
    dense = classifier()
    run(make_trainer, dense, [], epochs=1).save_checkpoint(tmp_path / "dense.ckpt")
    module, record = classifier(seed=1), Record()
    run(make_trainer, module, [LowRank(2, at=0.5), record], ckpt_path=tmp_path / "dense.ckpt")
    assert [bool(found) for found in record.before] == [False] * 6 + [True] * 6

    run(make_trainer, classifier(), [LowRank(2, at=9), Save(tmp_path)])
    record = Record()
    with pytest.warns(UserWarning, match=r"at=9,.* going on with LowRank\(r=2,.* at=11"):
        run(make_trainer, classifier(), [LowRank(2, at=11), record], 3, tmp_path / "6.ckpt")
    assert [bool(found) for found in record.before] == [False] * 5 + [True] * 7
    record = Record()
    with pytest.warns(UserWarning, match=r"at=9,.* going on with LowRank\(r=2,.* at=0.5"):
        run(make_trainer, classifier(), [LowRank(2, at=0.5), record], 3, tmp_path / "6.ckpt")
    assert [bool(found) for found in record.before] == [False] * 3 + [True] * 9  # half of all 18
    with pytest.warns(UserWarning, match=r"keeps its structure; LowRank\(r=3,.* is not applied"):
        run(make_trainer, classifier(), [LowRank(3, at=9)], 3, tmp_path / "12.ckpt")


@pytest.mark.parametrize("at", [9, 0.5])
def test_resuming_with_other_ranks_keeps_the_step(make_trainer, tmp_path, at):
    run(make_trainer, classifier(), [LowRank(2, at=at), Save(tmp_path)])
    record, module = Record(), classifier()
    with pytest.warns(UserWarning, match=r"going on with LowRank\(r=3,"):
        run(make_trainer, module, [LowRank(3, at=at), record], 3, tmp_path / "6.ckpt")
    assert [bool(found) for found in record.before] == [False] * 3 + [True] * 9
    assert set(ranks(module).values()) == {3}


def test_a_checkpoint_from_after_is_evaluated_by_a_fresh_module(make_trainer, tmp_path):
    module = classifier()
    run(make_trainer, module, [LowRank(2, at=9)]).save_checkpoint(tmp_path / "x.ckpt")
    fresh = classifier(seed=1)
    make_trainer(callbacks=[LowRank(2, at=9)]).test(
        fresh, small_data(8), ckpt_path=tmp_path / "x.ckpt", verbose=False
    )
    assert_equal(fresh, module)


def test_a_second_fit(make_trainer):
    module = classifier()
    trainer = run(make_trainer, module, [LowRank(2, at=9)])
    layers = list(module.modules())
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, small_data(), small_data(8))
    assert list(module.modules()) == layers
