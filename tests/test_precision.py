"""Pruning, low rank and distillation together, in other precisions, layouts, and compiled."""

import copy
from functools import partial

import lightning as L
import pytest
import torch
from torch import nn

import slimnets
from slimnets import DistillationModule, GradualPrune, LowRank, factorize, merge
from tests.support import (
    SPARSITY,
    Classifier,
    assert_compressed,
    assert_equal,
    small_data,
    small_network,
)

# Dynamo looks at it while it traces what is around the student
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

LAST = torch.channels_last


def stack(at=None):
    return [GradualPrune(SPARSITY, end=0.9), LowRank(r=2, at=at)]


def distilled(student):
    arguments = {}
    if not isinstance(student, L.LightningModule):
        arguments["optimizer"] = partial(torch.optim.Adam, lr=0.01)
    torch.manual_seed(1)
    return DistillationModule(student, small_network(), **arguments)


def fit(make_trainer, module, at=None, **arguments):
    L.seed_everything(2, verbose=False)
    trainer = make_trainer(max_epochs=2, callbacks=stack(at), **arguments)
    trainer.fit(module, small_data(), small_data(8))
    return trainer


@pytest.mark.parametrize(
    ("precision", "dtype", "at"),
    [
        ("32-true", torch.float32, None),
        ("64-true", torch.float64, 6),
        ("bf16-mixed", torch.float32, None),
        ("bf16-mixed", torch.float32, 6),
        ("bf16-true", torch.bfloat16, None),
        ("bf16-true", torch.bfloat16, 6),
    ],
)
def test_the_stack_in_every_precision(make_trainer, tmp_path, precision, dtype, at):
    module = distilled(small_network())
    module.teacher.double()  # keeps its own
    seen = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            seen.append({p.dtype for p in pl_module.parameters()})

    L.seed_everything(2, verbose=False)
    trainer = make_trainer(max_epochs=2, precision=precision, callbacks=[*stack(at), Look()])
    trainer.fit(module, small_data(), small_data(8))
    assert seen == [{dtype}] * 12
    assert next(module.teacher.parameters()).dtype == torch.float64
    assert_compressed(module.student)
    slimnets.save(module, tmp_path / "x.safetensors")
    fresh = slimnets.load(tmp_path / "x.safetensors", small_network().to(dtype))
    assert_equal(module.student, fresh)


def test_a_run_in_mixed_precision_differs_from_one_in_single(make_trainer):
    results = []
    for precision in ("32-true", "bf16-mixed"):
        torch.manual_seed(0)
        module = distilled(small_network())
        fit(make_trainer, module, precision=precision)
        results.append(module.student[7].first.weight)
    assert not torch.equal(*results)


COMPILED = {
    "student": lambda: distilled(torch.compile(small_network(), backend="eager")),
    "in place": lambda: distilled(compiled_in_place(small_network())),
    "inside": lambda: distilled(Classifier(torch.compile(small_network(), backend="eager"))),
    "lightning": lambda: torch.compile(distilled(Classifier()), backend="aot_eager"),
}
PLAIN = {
    "student": lambda: distilled(small_network()),
    "in place": lambda: distilled(small_network()),
    "inside": lambda: distilled(Classifier()),
    "lightning": lambda: distilled(Classifier()),
}


def compiled_in_place(network):
    network.compile(backend="eager")
    return network


def network_of(module):
    network = getattr(module, "_orig_mod", module).student
    network = network.network if isinstance(network, Classifier) else network
    return getattr(network, "_orig_mod", network)


@pytest.mark.parametrize(
    ("kind", "at"),
    [
        ("student", None),
        ("student", 6),
        ("in place", None),
        ("inside", 6),
        ("lightning", 6),
    ],
)
def test_a_compiled_student_is_compressed_as_one_that_is_not(make_trainer, tmp_path, kind, at):
    torch.manual_seed(0)
    plain = PLAIN[kind]()
    fit(make_trainer, plain, at)
    torch.manual_seed(0)
    compiled = COMPILED[kind]()
    trainer = fit(make_trainer, compiled, at)
    network, expected = network_of(compiled), network_of(plain)
    assert_compressed(network)
    for one, two in zip(network.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in network.parameters()}

    path = tmp_path / "x.safetensors"
    slimnets.save(network, path)
    assert_equal(network, slimnets.load(path, small_network()))


def test_a_file_of_a_compiled_student_is_that_of_one_that_is_not(make_trainer, tmp_path):
    module = COMPILED["student"]()
    fit(make_trainer, module)
    inner = module.student._orig_mod
    for name, what in (("student", module.student), ("module", module), ("plain", inner)):
        slimnets.save(what, tmp_path / name)
        assert_equal(inner, slimnets.load(tmp_path / name, small_network()))
    fresh = torch.compile(small_network(), backend="eager")
    assert slimnets.load(tmp_path / "student", fresh) is fresh
    inputs = torch.randn(3, 3, 8, 8)
    assert torch.equal(fresh.eval()(inputs), inner.eval()(inputs))
    rows = slimnets.summarize(module.student).to_dict()
    assert rows == slimnets.summarize(inner).to_dict()


def test_a_checkpoint_of_a_compiled_student_goes_on(make_trainer, tmp_path):
    module = COMPILED["student"]()
    trainer = fit(make_trainer, module)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    expected = trainer.predict(module, small_data(8))
    again = COMPILED["student"]()
    again.teacher.load_state_dict(module.teacher.state_dict())
    found = make_trainer(callbacks=stack()).predict(
        again, small_data(8), ckpt_path=tmp_path / "x.ckpt"
    )
    assert torch.equal(found[0], expected[0])


def test_a_compiled_lightning_module_as_the_student_is_refused():
    with pytest.raises(TypeError, match="compile its layers, or the DistillationModule"):
        distilled(torch.compile(Classifier(), backend="eager"))


def is_last(weight):
    return weight.is_contiguous(memory_format=LAST)


@pytest.mark.parametrize("decomposition", ["spatial", "channel"])
def test_pairs_have_the_memory_format_of_their_layers_and_give_it_back(decomposition):
    for layout in (torch.contiguous_format, LAST):
        conv = nn.Conv2d(8, 16, 3, padding=1).to(memory_format=layout)
        pair = factorize(conv, r=4, decomposition=decomposition)
        for weight in (pair.first.weight, pair.second.weight):
            assert weight.is_contiguous(memory_format=layout)
        assert merge(pair).weight.stride() == conv.weight.stride()


@pytest.mark.parametrize("at", [None, 6])
def test_channels_last_stays_and_changes_nothing(make_trainer, tmp_path, at):
    results, outputs = [], []
    for layout in (torch.contiguous_format, LAST):
        torch.manual_seed(0)
        student = small_network()
        module = distilled(student).to(memory_format=layout)
        trainer = fit(make_trainer, module, at)
        convolutions = [student[n] for n in (0, 3)]
        for conv in convolutions:
            for weight in (conv.first.weight, conv.second.weight):
                assert weight.is_contiguous(memory_format=layout)
                moments = trainer.optimizers[0].state[weight]["exp_avg"]
                assert moments.stride() == weight.stride()
        assert_compressed(student)
        results.append(student)
        images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        features = student.eval()[:4](images.to(memory_format=layout))
        assert features.is_contiguous(memory_format=layout)
        outputs.append(student(images))
    torch.testing.assert_close(*outputs, rtol=1e-2, atol=1e-2)
    slimnets.save(results[1], tmp_path / "x.safetensors")
    fresh = small_network().to(memory_format=LAST)
    slimnets.load(tmp_path / "x.safetensors", fresh)
    assert is_last(fresh[3].first.weight)
    assert_equal(results[1], fresh)


def test_channels_last_is_kept_when_a_checkpoint_gives_the_structure(make_trainer, tmp_path):
    student = small_network().to(memory_format=LAST)
    module = distilled(student)
    trainer = fit(make_trainer, module)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    other = copy.deepcopy(module)
    other.student = small_network().to(memory_format=LAST)
    trainer = make_trainer(max_epochs=3, callbacks=stack())
    trainer.fit(other, small_data(), small_data(8), ckpt_path=tmp_path / "x.ckpt")
    assert is_last(other.student[3].first.weight)
    assert not other.student[3].first.weight.is_contiguous()
    assert_compressed(other.student)
