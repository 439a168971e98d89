"""Which optimizer steps GradualPrune counts, and how long a run is."""

import copy
from contextlib import suppress

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import nn
from torch.utils.data import DataLoader

from slimnets import GradualPrune
from slimnets.pruning import linear
from tests.pruning.runs import Manual, expected, run
from tests.support import Classifier, Endless, assert_equal, small_data, small_network, zeros


@pytest.mark.parametrize("batches", [1, 2, 3, 5, 12])
@pytest.mark.parametrize("accumulate", [1, 2, 5])
@pytest.mark.parametrize("span", [{}, {"end": 1.0}, {"begin": 0.5, "every": 0.3}])
def test_the_target_is_reached_whatever_the_step_counts(make_trainer, batches, accumulate, span):
    module, *_ = run(
        make_trainer,
        GradualPrune(0.77, **span),
        data=small_data(n=4 * batches, batch_size=4),
        accumulate_grad_batches=accumulate,
        epochs=2,
    )
    assert zeros(module) == expected(module, 0.77)


def test_under_a_gradient_accumulation_scheduler(make_trainer):
    prune = GradualPrune(0.9, end=1.0)
    module, *_ = run(
        make_trainer, prune, callbacks=[GradientAccumulationScheduler({0: 1, 1: 4})], epochs=3
    )
    assert prune._run.clock.span.end == 6 + 2 + 2
    assert zeros(module) == expected(module, 0.9)


def test_the_steps_of_the_schedule_are_those_of_the_optimizer(make_trainer):
    prune = GradualPrune(0.5, begin=4, end=8, every=2, schedule=linear)
    _, watch, _ = run(make_trainer, prune, epochs=2)
    total = sum(mask.numel() for mask in prune.masks.values())
    shares = [round(count / total, 2) for count in watch.history]
    assert shares == [0, 0, 0, 0, 0, 0.25, 0.25, 0.5, 0.5, 0.5, 0.5, 0.5]


def test_manual_optimization_counts_the_steps_of_the_optimizer_that_owns_the_weights(make_trainer):
    seen = []

    class Record(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            counts = zeros(pl_module)
            seen.append((counts["network.0.weight"], counts["network.7.weight"]))

    prune = GradualPrune(0.5, begin=0, end=4, every=4, schedule=linear)
    module, *_ = run(make_trainer, prune, Manual(), callbacks=[Record()], epochs=2)
    head_done = next(i for i, (_, head) in enumerate(seen) if head)
    features_done = next(i for i, (features, _) in enumerate(seen) if features)
    assert (head_done, features_done) == (3, 7)
    assert zeros(module) == expected(module, 0.5)


def test_globally_under_two_optimizers_the_slower_is_the_clock(make_trainer):
    prune = GradualPrune(0.5, begin=0, end=4, every=1, scope="global")
    module, watch, _ = run(make_trainer, prune, Manual(), epochs=2)
    total = sum(expected(module, 1.0).values())
    assert watch.history[6] < round(0.5 * total)
    assert watch.history[7] == round(0.5 * total)


class AdamThenLBFGS(Classifier):
    """One optimizer after the other, both over all weights, as physics-informed networks have."""

    def __init__(self):
        super().__init__(small_network(norm=False))
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()[self.current_epoch >= 2]

        def closure():
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
            self.manual_backward(loss)
            return loss

        optimizer.step(closure)

    def configure_optimizers(self):
        everything, head = self.parameters(), self.network[7:].parameters()
        return (
            torch.optim.Adam(everything, lr=1e-3),
            torch.optim.LBFGS(self.parameters(), max_iter=2),
            torch.optim.SGD(head, lr=0.1),  # never stepped
        )


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("end", [9, 15])
def test_of_weights_of_several_optimizers_the_steps_of_all_count(make_trainer, every, end):
    prune = GradualPrune(0.9, begin=0, end=end, every=every, schedule=linear)
    module, watch, _ = run(make_trainer, prune, AdamThenLBFGS())
    assert prune._run.clock.steps == [12, 6, 0]
    total = sum(expected(module, 1.0).values())
    updates = [min(step // every * every, end) if step < end else end for step in range(1, 19)]
    for count, step in zip(watch.history, updates, strict=True):
        assert count / total == pytest.approx(0.9 * step / end, abs=1e-3)
    assert zeros(module) == expected(module, 0.9)


def test_a_run_of_several_optimizers_that_is_too_short_tells_the_steps_of_all(make_trainer):
    prune = GradualPrune(0.9, begin=0, end=20, every=1)
    with pytest.warns(UserWarning, match="stopped after 18 optimizer steps, .* at step 20"):
        run(make_trainer, prune, AdamThenLBFGS())


class Nested(torch.optim.SGD):
    """Steps by a step of its parent, whose hooks torch then calls too."""

    calls = 0

    def step(self, closure=None):
        loss = super().step(closure)
        self.calls += 1
        if self.calls == 3:
            raise FloatingPointError
        return loss


class Forgiving(Classifier):
    """Goes on where a step has raised."""

    def __init__(self):
        super().__init__(optimizer=Nested, lr=0.1)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
        with suppress(FloatingPointError):
            optimizer.step()


class Compiled(Forgiving):
    """The step of its optimizer is compiled, and with it what is called in it."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        optimizer.step = torch.compile(optimizer.step, backend="eager")
        return optimizer


def test_a_step_of_the_optimizer_that_is_compiled(make_trainer):
    prune = GradualPrune(0.9, begin=0, end=4, every=1, schedule=linear)
    module, watch, _ = run(make_trainer, prune, Compiled(), epochs=1)
    total = sum(expected(module, 1.0).values())
    shares = [round(count / total * 4 / 0.9, 1) for count in watch.history]
    assert shares == [1, 2, 3, 4, 4, 4]
    assert zeros(module) == expected(module, 0.9)


def test_a_step_within_a_step_is_one_step_and_one_that_raises_is_none(make_trainer):
    torch.optim.SGD([torch.zeros(1)])  # from now on torch calls the hooks of a step within a step
    prune = GradualPrune(0.9, begin=0, end=11, every=1, schedule=linear)
    module, watch, _ = run(make_trainer, prune, Forgiving(), epochs=2)
    assert prune._run.clock.steps == [11]
    total = sum(mask.numel() for mask in prune.masks.values())
    shares = [round(count / total * 11 / 0.9, 1) for count in watch.history]
    assert shares == [1, 2, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    assert zeros(module) == expected(module, 0.9)


@pytest.mark.parametrize("argument", ["begin", "end", "every"])
def test_manual_optimization_needs_ints(make_trainer, argument):
    arguments = {"begin": 0, "end": 4, "every": 1, argument: 0.5}
    module = Manual()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=rf"{argument}=0.5 is a fraction of the run.*ints"):
        run(make_trainer, GradualPrune(0.5, **arguments), module)
    assert_equal(module, before)


def test_a_loader_without_length(make_trainer):
    data = DataLoader(Endless(), batch_size=4)
    module, *_ = run(make_trainer, GradualPrune(0.9), data=data, epochs=-1, max_steps=12)
    assert zeros(module) == expected(module, 0.9)
    with pytest.raises(ValueError, match="number of optimizer steps of this run is not known"):
        run(make_trainer, GradualPrune(0.9), data=data, limit_train_batches=None, epochs=1)


def test_a_time_limit_needs_ints(make_trainer):
    limit = {"max_time": {"minutes": 1}}
    with pytest.raises(ValueError, match="a time limit"):
        run(make_trainer, GradualPrune(0.9), **limit)
    module, *_ = run(make_trainer, GradualPrune(0.9, begin=0, end=10, every=1), **limit)
    assert zeros(module) == expected(module, 0.9)


def test_a_run_that_is_too_short_fails_at_the_start(make_trainer):
    module = Classifier()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match="end=1000: the run has only 18 optimizer steps"):
        run(make_trainer, GradualPrune(0.9, begin=0, end=1000, every=100), module)
    assert_equal(module, before)


def test_a_run_that_stops_early_says_how_sparse_it_is(make_trainer):
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step >= 6

    prune = GradualPrune(0.9)
    with pytest.warns(UserWarning, match=r"stopped after 6 optimizer steps.*not 90\.0"):
        run(make_trainer, prune, callbacks=[Stop()])
    assert not prune.target_reached


def test_without_an_optimizer_it_says_that_nothing_was_pruned(make_trainer):
    class Without(Manual):
        def configure_optimizers(self):
            return []

        def training_step(self, batch, batch_idx):
            self(batch[0])

    prune = GradualPrune(0.9, begin=0, end=2, every=1)
    with pytest.warns(UserWarning, match="stopped after 0 optimizer steps"):
        make_trainer(max_epochs=1, callbacks=[prune]).fit(Without(), small_data(), small_data(8))


@pytest.mark.parametrize("more", [False, True])
def test_optimizers_that_are_made_anew_in_the_middle_of_a_run(make_trainer, more):
    class Anew(L.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                trainer.strategy.setup_optimizers(trainer)
                if more:
                    pl_module.spare = torch.nn.Parameter(torch.zeros(1))
                    trainer.optimizers += [torch.optim.SGD([pl_module.spare], 0.1)]

    module = Manual() if more else Classifier()
    prune = GradualPrune(0.9, begin=0, end=10, every=1)
    module, watch, _ = run(make_trainer, prune, module, callbacks=[Anew()], epochs=4)
    assert zeros(module) == expected(module, 0.9)
    assert watch.history == sorted(watch.history)


class OneAfterTheOther(Manual):
    """The second optimizer's weights have no gradients when the first one steps."""

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
            weights = [w for group in optimizer.param_groups for w in group["params"]]
            optimizer.zero_grad()
            for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
                weight.grad = gradient
            optimizer.step()


def test_a_criterion_is_tried_with_weights_whose_gradients_are_there(make_trainer):
    prune = GradualPrune(
        0.9, begin=0, end=4, every=1, criterion=lambda weights: (weights * weights.grad).abs()
    )
    run(make_trainer, prune, OneAfterTheOther())
    assert prune.target_reached


def test_steps_may_be_numbers_of_numpy(make_trainer):
    prune = GradualPrune(0.5, begin=np.int64(1), end=np.float32(0.5), every=np.int32(1))
    run(make_trainer, prune)
    assert repr((prune.begin, prune.end, prune.every)) == "(1, 0.5, 1)"
    assert prune.target_reached
