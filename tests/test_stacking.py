"""The three methods on one Trainer."""

import copy
import re
import warnings
from functools import partial
from itertools import permutations

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import nn

import slimnets
from slimnets import DistillationModule, ExactResume, GradualPrune, LowRank
from slimnets.pruning import random
from tests.support import Classifier, Save, assert_equal, assert_sparse, small_data, small_network

pytestmark = [  # a resumed run writes elsewhere here, and not always checkpoints
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]

ADAM = partial(torch.optim.Adam, lr=0.01)


def distillation(student=None, **arguments):
    L.seed_everything(3, verbose=False)
    student = student if student is not None else small_network(dropout=0.2)
    teacher = small_network()
    if not isinstance(student, L.LightningModule):
        arguments["optimizer"] = ADAM
    return DistillationModule(student=student, teacher=teacher, **arguments)


def fit(make_trainer, callbacks, module=None, epochs=3, ckpt_path=None, **arguments):
    module = module or distillation()
    L.seed_everything(4, verbose=False)
    trainer = make_trainer(max_epochs=epochs, callbacks=callbacks, **arguments)
    trainer.fit(module, small_data(shuffle=True), small_data(8), ckpt_path=ckpt_path)
    return module, trainer


def test_the_three_lines_of_the_readme(make_trainer, tmp_path):
    student = small_network()
    module = DistillationModule(student=student, teacher=small_network())
    trainer = make_trainer(max_epochs=3, callbacks=[GradualPrune(0.9), LowRank(r=4)])
    trainer.fit(module, small_data(), small_data(8))
    slimnets.save(student, tmp_path / "student.safetensors")
    again = slimnets.load(tmp_path / "student.safetensors", small_network())
    inputs = torch.randn(5, 3, 8, 8)
    assert torch.equal(student.eval()(inputs), again.eval()(inputs))
    assert list(again.state_dict()) == list(student.state_dict())
    dense = tmp_path / "dense.pt"
    torch.save(small_network().state_dict(), dense)
    assert (tmp_path / "student.safetensors").stat().st_size < dense.stat().st_size / 5


@pytest.mark.parametrize("student", [small_network, Classifier], ids=["module", "lightning"])
def test_every_order_of_the_callbacks_gives_the_same_network(make_trainer, student):
    make = {
        "prune": lambda: GradualPrune(0.75),
        "lowrank": lambda: LowRank(r=0.25),
        "average": lambda: EMAWeightAveraging(decay=0.9),
    }
    results = []
    for order in permutations(make):
        torch.manual_seed(7)
        module, _ = fit(make_trainer, [make[name]() for name in order], distillation(student()))
        results.append(module.student)
        assert_sparse(module.student)
    for other in results[1:]:
        assert_equal(other, results[0])
    assert any(".first.weight" in key for key in results[0].state_dict())


def test_averaged_weights_in_the_checkpoint_are_as_sparse_as_at_the_end(make_trainer, tmp_path):
    callbacks = [EMAWeightAveraging(decay=0.999), GradualPrune(0.75, end=0.6), LowRank(r=0.25)]
    checkpoint = ModelCheckpoint(tmp_path, filename="last")
    fit(make_trainer, [*callbacks, checkpoint], enable_checkpointing=True)
    state = torch.load(tmp_path / "last.ckpt")["state_dict"]
    pairs = {k: v for k, v in state.items() if v.ndim > 1}
    assert any(".second.weight" in key for key in pairs)
    for value in pairs.values():
        assert int((value == 0).sum()) == round(0.75 * value.numel())


def stacked(folder, average=False, energy=None):
    lowrank = LowRank(energy=energy) if energy else LowRank(r=0.25)
    callbacks = [GradualPrune(0.75, end=0.8), lowrank, ExactResume()]
    if average:
        callbacks.insert(1, EMAWeightAveraging(decay=0.9))
    return [*callbacks, ModelCheckpoint(folder, save_top_k=-1, filename="{epoch}")]


@pytest.mark.parametrize("energy", [None, 0.7])
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("epoch", [0, 3])
def test_resuming_from_an_epoch_continues_bit_for_bit(
    make_trainer, tmp_path, energy, average, epoch
):
    arguments = {"epochs": 5, "enable_checkpointing": True}
    whole, trainer = fit(make_trainer, stacked(tmp_path / "a", average, energy), **arguments)
    torch.manual_seed(99)
    other = distillation(small_network(dropout=0.2))
    for parameter in other.student.parameters():  # what it starts with must not matter
        nn.init.normal_(parameter)
    other.teacher.load_state_dict(whole.teacher.state_dict())
    again, resumed = fit(
        make_trainer,
        stacked(tmp_path / "b", average, energy),
        other,
        ckpt_path=tmp_path / f"a/epoch={epoch}.ckpt",
        **arguments,
    )
    assert_equal(whole, again)
    states = (t.optimizers[0].state_dict()["state"].values() for t in (trainer, resumed))
    for a, b in zip(*states, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_compressed_checkpoint_is_tested_and_predicted_with_a_fresh_model(make_trainer, tmp_path):
    module, trainer = fit(make_trainer, [GradualPrune(0.75), LowRank(energy=0.7)])
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    expected = trainer.predict(module, small_data(8))
    fresh = distillation()
    found = make_trainer(callbacks=[LowRank(energy=0.7)]).predict(
        fresh, small_data(8), ckpt_path=tmp_path / "x.ckpt"
    )
    assert torch.equal(expected[0], found[0])
    assert make_trainer().test(
        distillation(), small_data(8), ckpt_path=tmp_path / "x.ckpt", verbose=False
    )
    loaded = DistillationModule.load_from_checkpoint(
        tmp_path / "x.ckpt", student=small_network(dropout=0.2), teacher=module.teacher
    )
    assert_equal(loaded, module)


@pytest.mark.parametrize("order", [0, 1])
def test_an_error_of_any_callback_leaves_the_model_as_it_was(make_trainer, order):
    module = distillation()
    before = copy.deepcopy(module.student)
    callbacks = [LowRank(r=4), GradualPrune({"nothing": 0.5})]
    with pytest.raises(ValueError, match="sparsity: 'nothing' matches no layer"):
        fit(make_trainer, callbacks if order else callbacks[::-1], module)
    assert str(module.student) == str(before)
    assert_equal(module.student, before)


def test_an_error_on_the_first_batch_leaves_the_model_as_it_was(make_trainer):
    student = small_network()
    before = copy.deepcopy(student)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(192, 7))
    module = DistillationModule(student=student, teacher=teacher)
    with pytest.raises(ValueError, match="shape"):
        fit(make_trainer, [GradualPrune(0.5, initial=0.2), LowRank(r=4)], module)
    assert str(student) == str(before)
    assert_equal(student, before)


def test_a_second_fit_goes_on_with_the_pairs_and_the_zeros(make_trainer):
    module, _ = fit(make_trainer, [GradualPrune(0.75), LowRank(r=0.25)])
    zeros = {n: p == 0 for n, p in module.student.named_parameters() if p.ndim > 1}
    module, _ = fit(make_trainer, [LowRank(r=0.25), GradualPrune(0.75)], module)
    for name, mask in zeros.items():
        assert torch.equal(module.student.get_parameter(name) == 0, mask)


def test_going_on_from_a_loaded_file_keeps_the_zeros(make_trainer, tmp_path):
    module, _ = fit(make_trainer, [GradualPrune(0.75), LowRank(r=0.25)])
    slimnets.save(module, tmp_path / "x.safetensors")
    student = slimnets.load(tmp_path / "x.safetensors", small_network(dropout=0.2))
    zeros = {n: p == 0 for n, p in student.named_parameters() if p.ndim > 1}
    fit(make_trainer, [GradualPrune(0.75), LowRank(r=0.25)], distillation(student))
    for name, mask in zeros.items():
        assert torch.equal(student.get_parameter(name) == 0, mask)


def test_only_the_student_changes(make_trainer):
    module = distillation()
    teacher = copy.deepcopy(module.teacher.state_dict())
    structure = str(module.teacher)
    fit(make_trainer, [GradualPrune(0.75), LowRank(r=0.25)], module)
    assert str(module.teacher) == structure
    assert_equal(module.teacher, teacher)


def test_globs_of_pruning_choose_the_pairs_in_the_place_of_layers(make_trainer):
    prune = GradualPrune({"7": 0.9, "[03]": 0.5})
    module, _ = fit(make_trainer, [prune, LowRank(r=0.25, exclude="0")])
    sparsities = {
        name: round(float((p == 0).float().mean()), 2)
        for name, p in module.student.named_parameters()
        if name in prune.masks
    }
    assert sparsities == {
        "0.weight": 0.5,
        "3.first.weight": 0.5,
        "3.second.weight": 0.5,
        "7.first.weight": 0.9,
        "7.second.weight": 0.9,
    }


@pytest.mark.parametrize("order", [1, -1])
def test_layers_replaced_in_the_middle_of_the_run_are_pruned_too(make_trainer, order):
    callbacks = [GradualPrune(0.75, end=0.9), LowRank(r=0.25, at=8)][::order]
    torch.manual_seed(7)
    module, _ = fit(make_trainer, callbacks)
    assert "7.first.weight" in dict(module.student.named_parameters())
    assert_sparse(module.student)


def test_the_order_makes_no_difference_in_the_middle_of_the_run_either(make_trainer):
    results = []
    for order in (1, -1):
        torch.manual_seed(7)
        module, _ = fit(make_trainer, [GradualPrune(0.75), LowRank(r=0.25, at=8)][::order])
        results.append(module.student)
    assert_equal(*results)


def test_a_checkpoint_between_the_replacement_and_the_next_step_is_resumed(make_trainer, tmp_path):
    class Dies(Classifier):
        def training_step(self, batch, batch_idx):
            if self.trainer.global_step == 8:
                raise RuntimeError("the node died")
            return super().training_step(batch, batch_idx)

    def callbacks(folder):
        save = ModelCheckpoint(folder, filename="x", save_on_exception=True)
        return [LowRank(r=0.25, at=8), GradualPrune(0.75, begin=2, end=14, every=1), save]

    with pytest.raises(RuntimeError, match="the node died"):
        fit(make_trainer, callbacks(tmp_path / "a"), Dies(), enable_checkpointing=True)
    path = tmp_path / "a/x.ckpt"
    assert "network.7.first.weight" in torch.load(path)["state_dict"]
    with pytest.warns(UserWarning, match="your dataloader is not resumable"):
        again = callbacks(tmp_path / "b")
        module, _ = fit(
            make_trainer, again, Classifier(), ckpt_path=path, enable_checkpointing=True
        )
    assert_sparse(module.network)


def test_zeros_of_other_layers_stay_where_some_are_replaced_in_the_middle(make_trainer):
    class Zeros(L.Callback):
        history = ()

        def on_train_batch_end(self, trainer, pl_module, *args):
            self.history += (pl_module.network[3].weight.detach() == 0,)

    zeros = Zeros()
    # masks that were chosen anew would be others
    callbacks = [GradualPrune(0.75, criterion=random), LowRank({"*.7": 4}, at=8), zeros]
    fit(make_trainer, callbacks, Classifier())
    for before, after in zip(zeros.history, zeros.history[1:], strict=False):
        assert after[before].all()


def test_a_resumed_run_that_is_too_short_says_so_at_its_start(make_trainer, tmp_path):
    def callbacks():
        return [GradualPrune(0.75, end=1.0), LowRank(r=0.25, at=0.75), Save(tmp_path)]

    fit(make_trainer, callbacks(), Classifier(), epochs=4)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fit(make_trainer, callbacks(), Classifier(), epochs=2, ckpt_path=tmp_path / "6.ckpt")
    ours = [str(one.message) for one in said if re.match("GradualPrune|LowRank", str(one.message))]
    assert re.match(r"GradualPrune: .* at step 24, .* ends after 12 optimizer steps", ours[0])
    assert re.match(r"LowRank\(at=0\.75\): .* at step 18, .* ends after 12 optimizer", ours[1])
    assert all("training stopped" in one for one in ours[2:]) and len(ours) == 4
    # a longer one, and one that is over what it was to do, have nothing to say
    for epochs, path in (5, "6.ckpt"), (4, "18.ckpt"):
        fit(make_trainer, callbacks(), Classifier(), epochs=epochs, ckpt_path=tmp_path / path)
