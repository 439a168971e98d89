"""LowRank and checkpoints: resume, fresh modules, averages."""

import copy
from collections import OrderedDict
from contextlib import nullcontext

import pytest
import torch
from lightning.pytorch.callbacks import (
    Callback,
    EMAWeightAveraging,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import nn

from slimnets import ExactResume
from slimnets.lowrank import LowRank, factorize
from slimnets.trainer import averaged_networks
from tests.support import Classifier, Save, assert_equal, ranks, small_data, small_network

# checkpoints lie where the test wants them
pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:Swapping scheduler"),
]


def classifier(seed=0, optimizer=torch.optim.Adam, **arguments):
    torch.manual_seed(seed)
    return Classifier(small_network(dropout=0.3), optimizer, **(arguments or {"lr": 0.01}))


def run(make_trainer, module, callbacks, epochs=4, ckpt_path=None, **arguments):
    trainer = make_trainer(max_epochs=epochs, callbacks=[*callbacks, ExactResume()], **arguments)
    # SWA keeps its scheduler, which torch 2.6 does not take for mere weights
    trainer.fit(
        module, small_data(shuffle=True), small_data(8), ckpt_path=ckpt_path, weights_only=False
    )
    return trainer


ARGUMENTS = {
    "energy": {"energy": 0.8},
    "budget": {"budget": 0.4},
    "rank": {"r": 3},
    "fraction": {"r": {"network.[03]": 0.5}, "decomposition": "channel"},
}


@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS)
def test_a_resumed_run_ends_bit_for_bit_like_one_that_was_not_interrupted(
    make_trainer, tmp_path, arguments
):
    whole = classifier()
    run(make_trainer, whole, [LowRank(**arguments), Save(tmp_path)])
    resumed = classifier(seed=1)  # other weights: energy= and budget= alone would give other ranks
    run(make_trainer, resumed, [LowRank(**arguments)], ckpt_path=tmp_path / "12.ckpt")
    assert ranks(resumed)
    assert_equal(resumed, whole)


def test_with_energy_the_ranks_are_those_of_the_checkpoint(make_trainer, tmp_path):
    module, other = classifier(), classifier(seed=5)
    trainer = run(make_trainer, module, [LowRank(energy=0.8)], epochs=1)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    assert ranks(factorize(other, energy=0.8)) != ranks(module)  # or the test shows nothing
    run(make_trainer, classifier(seed=5), [LowRank(energy=0.8)], 2, tmp_path / "x.ckpt")


def test_a_checkpoint_from_before_an_argument_was_there_is_resumed_without_a_warning(
    make_trainer, tmp_path
):
    trainer = run(make_trainer, classifier(), [LowRank(2)], epochs=1)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    checkpoint = torch.load(tmp_path / "x.ckpt", weights_only=False)
    (key,) = (one for one in checkpoint["callbacks"] if one.startswith("LowRank"))
    del checkpoint["callbacks"][key]["arguments"]["budget"]
    torch.save(checkpoint, tmp_path / "x.ckpt")
    run(make_trainer, classifier(), [LowRank(2)], 2, tmp_path / "x.ckpt")


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("stage", ["test", "validate", "predict"])
def test_a_checkpoint_of_weights_only_stays_loaded(make_trainer, tmp_path, stage, fails):
    class Fails(Callback):
        def on_test_batch_start(self, *_):
            raise RuntimeError("stop")

        on_validation_batch_start = on_predict_batch_start = on_test_batch_start

    module = classifier()
    trainer = run(make_trainer, module, [LowRank(r=3)], epochs=1)
    trainer.save_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    fresh = classifier(seed=1)
    other = make_trainer(callbacks=[LowRank(r=3), *([Fails()] if fails else [])])
    with pytest.raises(RuntimeError, match="stop") if fails else nullcontext():
        getattr(other, stage)(fresh, small_data(8), ckpt_path=tmp_path / "x.ckpt")
    assert_equal(fresh, module)


def test_the_same_trainer_resumes_a_run_that_is_over(make_trainer, tmp_path):
    module, fresh = classifier(), classifier(seed=1)
    trainer = run(make_trainer, module, [LowRank(r=3)], epochs=1)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    checkpoint = tmp_path / "x.ckpt"
    trainer.fit(fresh, small_data(), small_data(8), ckpt_path=checkpoint, weights_only=False)
    assert_equal(fresh, module)


@pytest.mark.parametrize("callbacks", [[LowRank(energy=0.8)], [LowRank(r=1)]])
def test_a_fresh_dense_module_is_tested_and_predicted_with(make_trainer, tmp_path, callbacks):
    module = classifier()
    trainer = run(make_trainer, module, [LowRank(energy=0.8)], epochs=1)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    expected = trainer.predict(module, small_data(8))
    metrics = trainer.test(module, small_data(8), verbose=False)
    for stage in ("predict", "test", "validate"):
        fresh = classifier(seed=1)
        other = make_trainer(callbacks=callbacks)
        extra = {} if stage == "predict" else {"verbose": False}
        found = getattr(other, stage)(fresh, small_data(8), ckpt_path=tmp_path / "x.ckpt", **extra)
        assert_equal(fresh, module)
        if stage == "test":
            assert found == metrics
        if stage == "predict":
            assert torch.equal(found[0], expected[0])


def test_a_dense_checkpoint_is_evaluated_by_a_compressed_module(make_trainer, tmp_path):
    dense = classifier()
    trainer = run(make_trainer, dense, [], epochs=1)
    trainer.save_checkpoint(tmp_path / "dense.ckpt")
    module = classifier()
    run(make_trainer, module, [LowRank(2)], epochs=1)
    make_trainer(callbacks=[LowRank(2)]).test(
        module, small_data(8), ckpt_path=tmp_path / "dense.ckpt", verbose=False
    )
    assert_equal(module, dense)


def test_a_run_cannot_be_resumed_from_a_dense_checkpoint(make_trainer, tmp_path):
    dense, module = classifier(), classifier(seed=1)
    run(make_trainer, dense, [], epochs=1).save_checkpoint(tmp_path / "dense.ckpt")
    with pytest.raises(ValueError, match=r"cannot resume from .*dense\.ckpt.*fit without ckpt_pa"):
        run(make_trainer, module, [LowRank(2)], 2, tmp_path / "dense.ckpt")
    assert_equal(module, dense)
    run(make_trainer, module, [LowRank(2)], 2)  # what the message advises
    assert len(ranks(module)) == 4


def test_a_callback_added_on_resume_warns_or_refuses(make_trainer, tmp_path):
    module = classifier()
    some = LowRank({"network.[03]": 2})
    run(make_trainer, module, [some], epochs=1).save_checkpoint(tmp_path / "x.ckpt")
    more = classifier()
    with pytest.warns(UserWarning, match=r"made with other callbacks .* LowRank\(r=2,"):
        run(make_trainer, more, [LowRank(2)], 2, tmp_path / "x.ckpt")
    assert ranks(more) == ranks(module)
    with pytest.raises(ValueError, match="cannot resume"):
        run(make_trainer, classifier(), [some, LowRank({"*[79]": 2})], 2, tmp_path / "x.ckpt")


def test_an_error_after_the_restore_leaves_the_network_of_the_checkpoint(make_trainer, tmp_path):
    class Fails(Callback):
        def on_train_start(self, trainer, pl_module):
            raise RuntimeError("broken elsewhere")

    module, again = classifier(), classifier(seed=1)
    run(make_trainer, module, [LowRank(2)], epochs=1).save_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(RuntimeError, match="broken elsewhere"):
        run(make_trainer, again, [LowRank(2), Fails()], 2, tmp_path / "x.ckpt")
    assert_equal(again, module)


def test_resuming_with_other_arguments_warns_and_keeps_the_structure(make_trainer, tmp_path):
    module = classifier()
    run(make_trainer, module, [LowRank(2)], epochs=1).save_checkpoint(tmp_path / "x.ckpt")
    kept = ranks(module)
    for other in (LowRank(4), LowRank(energy=0.5), LowRank(2, decomposition="channel")):
        again = classifier(seed=1)
        with pytest.warns(UserWarning, match=r"made with LowRank\(r=2, .* is not applied"):
            run(make_trainer, again, [other], 2, tmp_path / "x.ckpt")
        assert ranks(again) == kept


def test_a_checkpoint_that_does_not_fit_leaves_the_layers_as_they_were(make_trainer, tmp_path):
    run(make_trainer, classifier(), [LowRank(2)], epochs=1).save_checkpoint(tmp_path / "x.ckpt")
    module = Classifier(nn.Sequential(OrderedDict(flat=nn.Flatten(), head=nn.Linear(192, 4))))
    layers = list(module.modules())
    with pytest.raises(RuntimeError, match="Missing key"):
        run(make_trainer, module, [LowRank(2)], 2, tmp_path / "x.ckpt")
    assert list(module.modules()) == layers
    deeper = classifier()
    deeper.network.append(nn.Linear(4, 4))
    layers = list(deeper.modules())
    with pytest.raises(RuntimeError, match="Missing key"):
        make_trainer(callbacks=[LowRank(2)]).test(
            deeper, small_data(8), ckpt_path=tmp_path / "x.ckpt"
        )
    assert list(deeper.modules()) == layers
    wider = Classifier(small_network())
    wider.network[7], wider.network[9] = nn.Linear(256, 40), nn.Linear(40, 4)
    before = copy.deepcopy(wider.network[7].weight)
    with pytest.raises(ValueError, match=r"network\.7\.first\.weight: \(2, 256\) and then"):
        run(make_trainer, wider, [LowRank(2)], 2, tmp_path / "x.ckpt")
    assert not ranks(wider)
    assert torch.equal(wider.network[7].weight, before)


class Look(Callback):
    """The structure of the averages, while it trains."""

    def on_train_epoch_end(self, trainer, pl_module):
        self.found = [ranks(network) for network in averaged_networks(trainer)]
        self.average = copy.deepcopy(next(averaged_networks(trainer)).state_dict())


AVERAGES = {
    "ema": lambda: EMAWeightAveraging(decay=0.8),
    "mean": WeightAveraging,
    "swa": lambda: StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2, annealing_epochs=1),
}


def without_norm():
    torch.manual_seed(0)
    return Classifier(small_network(norm=False), torch.optim.Adam, lr=0.01)


@pytest.mark.parametrize("average", AVERAGES.values(), ids=AVERAGES)
def test_averages_have_the_same_structure_in_both_orders(make_trainer, average):
    results = []
    for order in (1, -1):
        module, look = without_norm(), Look()
        callbacks = [LowRank(energy=0.8), average()][::order]
        run(make_trainer, module, [*callbacks, look])
        assert look.found == [ranks(module)]
        assert ranks(module)
        results.append(module)
    assert_equal(*results)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("average", AVERAGES.values(), ids=AVERAGES)
def test_a_run_with_averages_is_resumed(make_trainer, tmp_path, average, order):
    def callbacks():
        return [LowRank(energy=0.8), average()][::order]

    whole, look = without_norm(), Look()
    run(make_trainer, whole, [*callbacks(), Save(tmp_path), look])
    resumed, again = without_norm(), Look()
    with torch.no_grad():
        for parameter in resumed.parameters():  # other weights, other ranks before the restore
            parameter.add_(torch.randn_like(parameter))
    run(make_trainer, resumed, [*callbacks(), again], ckpt_path=tmp_path / "18.ckpt")
    assert again.found == look.found == [ranks(resumed)]
    for name, value in look.average.items():
        assert torch.equal(again.average[name], value), name
    assert_equal(resumed, whole)


def test_averages_begun_on_resume_have_the_structure_of_the_checkpoint(make_trainer, tmp_path):
    module = without_norm()
    run(make_trainer, module, [LowRank(energy=0.8)], 1).save_checkpoint(tmp_path / "x.ckpt")
    for name in ("ema", "swa"):
        resumed, look = without_norm(), Look()
        callbacks = [AVERAGES[name](), LowRank(r=1), look]
        match = "not created with WeightAveraging|made with LowRank"
        with pytest.warns(UserWarning, match=match):
            run(make_trainer, resumed, callbacks, ckpt_path=tmp_path / "x.ckpt")
        assert look.found == [ranks(resumed)] == [ranks(module)]


@pytest.mark.parametrize("order", [1, -1])
def test_the_averaged_checkpoint_is_loaded_into_a_fresh_module(make_trainer, tmp_path, order):
    module = without_norm()
    callbacks = [LowRank(energy=0.8), EMAWeightAveraging(decay=0.8)][::order]
    trainer = run(make_trainer, module, callbacks)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    fresh = without_norm()
    make_trainer(callbacks=[LowRank(r=1)]).test(
        fresh, small_data(8), ckpt_path=tmp_path / "x.ckpt", verbose=False
    )
    assert_equal(fresh, module)
