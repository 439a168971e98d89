"""Every example runs as its first lines say, and leaves what it promises."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
from safetensors.torch import save_file
from torch import nn

import slimnets
from tests.support import run_script

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(folder: Path, script: str, *arguments: object) -> str:
    """What an example prints, run in a process of its own in ``folder``."""
    return run_script(EXAMPLES / script, *arguments, cwd=folder, COLUMNS="120")


@contextmanager
def example(name: str) -> Iterator[ModuleType]:
    """An example as a module, found where the scripts find each other."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        yield __import__(name)
    finally:
        sys.path.remove(str(EXAMPLES))


def table(printed: str) -> dict[str, list[str]]:
    """The cells of the last table, by the first of each row."""
    _, _, last = printed.partition("dense against compressed")
    rows = [line.split() for line in last.splitlines()]
    return {row[0]: row[1:] for row in rows if len(row) > 3}


def zeros(network: nn.Module) -> float:
    weights = [parameter for parameter in network.parameters() if parameter.dim() > 1]
    return sum(int((one == 0).sum()) for one in weights) / sum(one.numel() for one in weights)


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("quickstart")
    return folder, run(folder, "quickstart.py", "--epochs", 1)


def test_quickstart_ends_with_a_table(quickstart: tuple[Path, str]) -> None:
    folder, printed = quickstart
    rows = table(printed)
    assert set(rows) == {"accuracy", "weights", "non-zeros", "bytes", "latency", "accelerated"}
    logs = folder / "lightning_logs"
    sizes = [(logs / name).stat().st_size for name in ("teacher.pt", "student.safetensors")]
    assert [int(cell.replace(",", "")) for cell in rows["bytes"][:2]] == sizes
    assert sizes[0] > 20 * sizes[1]
    # one epoch is enough to know digits from guesses
    assert all(float(cell.strip("%")) > 50 for cell in rows["accuracy"][:2])


def test_quickstarts_file_holds_what_the_table_says(quickstart: tuple[Path, str]) -> None:
    folder, printed = quickstart
    with example("quickstart") as module:
        network = slimnets.load(folder / "lightning_logs/student.safetensors", module.Classifier())
    total = slimnets.summarize(network).total
    assert table(printed)["non-zeros"][1] == f"{total.nonzeros:,}"
    assert zeros(network) == pytest.approx(0.9, abs=0.001)
    ranks = [row.rank for row in slimnets.summarize(network).rows if row.rank]
    assert set(ranks) == {16}


def test_quickstart_shows_its_runs_in_tensorboard(quickstart: tuple[Path, str]) -> None:
    folder, _ = quickstart
    for name in ("teacher", "student"):
        assert list((folder / "lightning_logs" / name).rglob("events.out.tfevents*"))


def test_the_yaml_goes_on_from_quickstarts_teacher(quickstart: tuple[Path, str]) -> None:
    folder, _ = quickstart
    config = EXAMPLES / "compress.yaml"
    printed = run(folder, "cli.py", "fit", "--config", config, "--trainer.max_epochs", 1)
    path = folder / "lightning_logs/cli/version_0/student.safetensors"
    assert f"{path.stat().st_size:,} bytes" in printed
    with example("quickstart") as module:
        assert zeros(slimnets.load(path, module.Classifier())) == pytest.approx(0.9, abs=0.001)

    # the configuration that was saved goes on with the checkpoint
    (checkpoint,) = path.parent.rglob("*.ckpt")
    saved = ["--config", path.with_name("config.yaml"), "--ckpt_path", checkpoint]
    assert "student_accuracy" in run(folder, "cli.py", "test", *saved)


def cifar10(folder: Path, images: Path, *options: object) -> tuple[str, Path]:
    """What the example prints in its fast mode, and the file it leaves."""
    given = ["--data-dir", images, "--batch-size", 4, "--held-out", 16, "--fast"]
    printed = run(folder, "cifar10.py", *given, *options)
    (path,) = (folder / "lightning_logs").rglob("student.safetensors")
    assert table(printed)["bytes"][1] == f"{path.stat().st_size:,}"
    return printed, path


def test_cifar10_with_a_teachers_file(tmp_path: Path, images: Path) -> None:
    with example("networks") as networks:
        teacher, student = networks.NETWORKS["vgg19"](), networks.NETWORKS["nin"]()
    save_file(teacher.state_dict(), tmp_path / "vgg19.safetensors")
    options = ["--teacher", "vgg19.safetensors", "--student", "nin", "--rank", "0.25"]
    printed, path = cifar10(tmp_path, images, *options)

    weights = sum(one.numel() for one in teacher.parameters() if one.dim() > 1)
    assert table(printed)["weights"][0] == f"{weights:,}"
    loaded = slimnets.load(path, student)
    assert zeros(loaded) == pytest.approx(0.9, abs=0.001)
    assert any(row.rank for row in slimnets.summarize(loaded).rows)


def test_cifar10_refuses_arguments_before_it_trains_a_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with example("cifar10") as module:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(module.L.Trainer, "fit", lambda *_: pytest.fail("it trains"))
        monkeypatch.setattr(sys, "argv", ["cifar10.py", "--sparsity", "90"])
        with pytest.raises(ValueError, match="sparsity=90"):
            module.main()
        monkeypatch.setattr(sys, "argv", ["cifar10.py", "--rank", "4", "--budget", "0.2"])
        with pytest.raises(ValueError, match=r"r=4, energy=None, budget=0\.2: give exactly one"):
            module.main()
        for wrong in (["--rank", "paper"], ["--epochs", "0"], ["--batch-size", "0"]):
            monkeypatch.setattr(sys, "argv", ["cifar10.py", *wrong])
            with pytest.raises(SystemExit):
                module.main()
            assert f"error: {' '.join(wrong)}: " in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_cifar10_trains_a_teacher_itself(tmp_path: Path, images: Path) -> None:
    options = ["--student", "vgg19", "--sparsity", "0.5", "--rank", "paper"]
    _, path = cifar10(tmp_path, images, *options)
    with example("networks") as networks:
        loaded = slimnets.load(path, networks.VGG(19))
        paper = networks.PAPER_RANKS
    assert zeros(loaded) == pytest.approx(0.5, abs=0.001)
    ranks = {row.name: row.rank for row in slimnets.summarize(loaded).rows if row.rank}
    assert ranks == {name: rank for name, rank in paper.items() if name in ranks}
    assert len(ranks) >= 15


def test_the_zoo_refuses_a_glob_that_matches_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "networks.md"
    monkeypatch.setattr(sys, "argv", ["zoo.py", "LSTM", "resnett*", "--markdown", str(page)])
    with example("zoo") as module, pytest.raises(SystemExit):
        module.main()
    assert "'resnett*' matches no network; there are 'LSTM', " in capsys.readouterr().err
    assert not page.exists()
