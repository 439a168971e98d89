"""The paper's tables: runs go on from each other, are not done twice, and end in a page."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import slimnets
from examples.networks import NETWORKS, VGG

PAPER = Path(__file__).parents[2] / "examples" / "paper"
LOGITS = [  # what the kept network gives for the images of seed 0
    [1.1482, 0.6615, 2.4775, 3.4799, 0.7361, -1.1213, 4.7584, -1.0876, -0.7493, 2.4534],
    [1.7421, 0.5747, 3.9754, 3.6670, 1.1401, -0.7095, 4.9715, -1.4368, -0.4054, 0.2012],
]
PROGRAM = """
import sys, warnings
from dataclasses import replace
from pathlib import Path
warnings.simplefilter("ignore")
import reproduce
from runs import Run, pruned
from train import result
from settings import Settings
import results
folder, images = Path("paper"), Path(sys.argv[1])
reference = Path("reference.safetensors")
settings = Settings(folder, images, epochs=2, reference_epochs=7, reference=reference,
                    answers=1, batch_size=8, device="cpu", batches=2)
taught = Run("cnn-1k", distilled=True)
result(Run("cnn-1k", of=taught, sparsity=0.75, rank=0.5, distilled=True), 1, settings)
result(Run("cnn-1k", distilled=True, beside=(taught,)), 1, settings)
result(Run("snn-1k", distilled=True, beside=(taught,)), 1, replace(settings, answers=0))
result(Run("cnn-1k"), 0, settings)
results.main(["--folder", str(folder), "--out", "docs"])
"""
INTERRUPTED = """
import sys, warnings
from dataclasses import replace
from pathlib import Path
warnings.simplefilter("ignore")
import reproduce, train
from runs import Run
from settings import Settings

class Stop(Exception):
    pass

class Interrupt(train.L.Callback):
    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 2:
            raise Stop

run, methods = Run("cnn-1k", sparsity=0.75, rank=0.5), train.methods
for folder in ("straight", "interrupted"):
    settings = Settings(Path(folder), Path(sys.argv[1]), epochs=2.5, batch_size=8, device="cpu")
    if folder == "interrupted":
        train.methods = lambda *arguments: [*methods(*arguments), Interrupt()]
        try:
            train.result(run, 0, settings)
        except Stop:
            train.methods = methods
    train.result(run, 0, settings)
try:
    train.result(run, 0, replace(settings, precision="bf16-true"))
except ValueError as error:
    print(error)
"""

TWO_PROCESSES = """
import os, sys, time
from pathlib import Path
import torch
import reproduce, answers, measure

torch.manual_seed(0)
child = os.fork()

def meet(place):
    Path(f"{place}-{'a' if child else 'b'}").touch()
    for _ in range(1000):
        if len(list(Path().glob(f"{place}-*"))) == 2:
            return
        time.sleep(0.01)
    sys.exit("the other process does not come")

def beside_the_other(write):
    def call(*arguments, **options):
        meet(f"{write.__name__}-begins")
        result = write(*arguments, **options)
        meet(f"{write.__name__}-ends")
        return result
    return call

answers.slimnets.accelerate = lambda network, image: network
torch.save, Path.write_text = map(beside_the_other, (torch.save, Path.write_text))
data = answers.AnsweredCIFAR10(Path("answers"), 1, data_dir=sys.argv[1], held_out=40)
data.setup("fit")
data.ask([torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 10))])
measure.write(Path("figures.json"), {"run": "cnn-1k"})
if child and os.waitpid(child, 0)[1]:
    sys.exit("the other process failed")
"""


SCHEDULED = """
import os, signal, time
from pathlib import Path
import reproduce, schedule
from runs import REFERENCE, Run
from settings import Settings

settings = Settings(Path("paper"), Path("images"))
small, others = Run("cnn-1k"), [Run("cnn-1k", distilled=True), Run("snn-1k", distilled=True)]
queue = [small, Run("cnn-1k", of=small, sparsity=0.75), REFERENCE, Run("snn-1k"), *others]

def result(run, seed, settings):
    if run == small:
        os.kill(os.getpid(), signal.SIGKILL)
    if run == Run("snn-1k"):
        raise ValueError("wrong")
    if run in others:  # each waits for the other to have begun
        Path(run.name).touch()
        while not all(Path(one.name).exists() for one in others):
            time.sleep(0.01)
    settings.path(run, seed).touch()
    seconds = 1e9 if run == REFERENCE else 600
    return {"files": {"float32": {"accuracy": 0.5}}, "epochs": 1, "seconds": seconds}

schedule.result = result

def main():
    settings.folder.mkdir()
    try:
        schedule.train_all([(run, 0, settings) for run in queue], 2)
    except SystemExit as stop:
        print(stop)
"""


def run(program: str, folder: Path, images: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program, images],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PAPER)},
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
def test_a_run_goes_on_where_it_was_interrupted(tmp_path: Path, images: Path) -> None:
    said = run(INTERRUPTED, tmp_path, images)
    assert "was made with precision=32-true, now bf16-true; give another folder" in said
    name = "cnn-1k-gradual75-spatial0.5-seed0"
    straight, interrupted = (
        json.loads((tmp_path / folder / f"{name}.json").read_text())
        for folder in ("straight", "interrupted")
    )
    assert straight["epochs"] == 2.5
    assert len(straight["accuracies"]) == 3
    assert interrupted["accuracies"] == straight["accuracies"]
    networks = [tmp_path / folder / f"{name}.safetensors" for folder in ("straight", "interrupted")]
    assert networks[0].read_bytes() == networks[1].read_bytes()


def test_two_processes_may_write_the_same_at_once(tmp_path: Path, images: Path) -> None:
    run(TWO_PROCESSES, tmp_path, images)
    assert json.loads((tmp_path / "figures.json").read_text()) == {"run": "cnn-1k"}


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_some_runs_at_the_same_time_and_what_fails_is_told_after_all_others(
    tmp_path: Path, images: Path
) -> None:
    (tmp_path / "scheduled.py").write_text(SCHEDULED)  # other processes import it
    said = run("import scheduled; scheduled.main()", tmp_path, images).splitlines()
    end = said.index("not trained:")
    done, failed = said[:end], said[end + 1 :]
    ended = {line.removeprefix("failed: ").split(",")[0]: line for line in done}
    assert len(ended) == len(done) == 5
    assert ended["cnn-1k"].startswith("failed: cnn-1k, seed 0: BrokenProcessPool(")
    assert ended["snn-1k"] == "failed: snn-1k, seed 0: ValueError('wrong')"
    assert "50.00% after 1 epochs" in ended["vgg19"]
    assert ended["vgg19"].endswith(" runs left")  # how long its own take is not known yet
    assert done[-1].endswith("; 1 runs and about 5 minutes left")  # 600 seconds, for two processes
    assert sorted(failed[:2]) == [ended[n].removeprefix("failed: ") for n in ("cnn-1k", "snn-1k")]
    assert failed[2:] == ["cnn-1k-then-gradual75, seed 0: begins with one of them"]


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_processes_end_with_the_one_that_began_them(tmp_path: Path) -> None:
    forever = SCHEDULED.replace('raise ValueError("wrong")', "time.sleep(1000)")
    (tmp_path / "scheduled.py").write_text(forever.replace("    if run == small", "    if False"))
    program = "import scheduled; scheduled.main()"
    begun = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PAPER)},
        stdout=subprocess.PIPE,
        text=True,
    )
    with begun:
        assert begun.stdout is not None
        while "vgg19" not in begun.stdout.readline():
            pass
        begun.kill()
        assert begun.stdout.read() == ""  # when all that write to it have ended


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_runs_and_their_page(tmp_path: Path, images: Path) -> None:
    save_file(VGG(19).state_dict(), tmp_path / "reference.safetensors")
    run(PROGRAM, tmp_path, images)
    folder = tmp_path / "paper"
    found = {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}
    last = "cnn-1k-distilled-then-gradual75-spatial0.5-distilled-seed1.json"
    assert set(found) == {
        "vgg19-seed0.json",
        "cnn-1k-seed0.json",
        "cnn-1k-distilled-seed1.json",
        "cnn-1k-distilled2-seed1.json",
        "snn-1k-distilled2-seed1.json",
        last,
    }
    assert {name: one["epochs"] for name, one in found.items()} == {
        "vgg19-seed0.json": 7,
        "cnn-1k-seed0.json": 2,
        "cnn-1k-distilled-seed1.json": 2,
        "cnn-1k-distilled2-seed1.json": 2,
        "snn-1k-distilled2-seed1.json": 2,
        last: 4,
    }
    assert found[last]["nonzeros"] == pytest.approx(0.25 * found[last]["weights"], rel=0.001)
    assert len(found[last]["accuracies"]) == 2
    sizes = [found[last]["files"][form]["bytes"] for form in ("float32", "int8", "int6")]
    assert sizes == sorted(sizes, reverse=True)
    page = (tmp_path / "docs" / "results.md").read_text()
    assert "| cnn-1k |" in page
    assert (tmp_path / "docs" / "results" / "bytes.png").stat().st_size > 1000

    written = {path: path.stat().st_mtime_ns for path in folder.glob("*.json")}
    run(PROGRAM, tmp_path, images)
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*.json")} == written


def test_the_network_that_is_kept() -> None:
    file = PAPER / "resnet10-medium.safetensors"
    assert 506 * file.stat().st_size < 82_338_011  # the dense VGG-19's, of torch.save
    network = slimnets.load(file, NETWORKS["resnet10-medium"]()).eval()
    total = slimnets.summarize(network).total
    assert total.nonzeros < 0.09 * total.weights
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = network(images)
    torch.testing.assert_close(logits, torch.tensor(LOGITS), rtol=1e-3, atol=1e-3)


def test_all_tables_name_networks_that_there_are_and_runs_that_can_be_asked_for() -> None:
    program = """
import reproduce
for run in reproduce.chosen(list(reproduce.TABLES), ["*"]):
    assert reproduce.chosen(list(reproduce.TABLES), [run.name])[-1] == run
    print(f"{run.network}={run.name}")
try:
    reproduce.main(["students", "--epochs", "0"])
except SystemExit as refused:
    assert refused.code == 2
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(PAPER)},
        capture_output=True,
        text=True,
        check=True,
    )
    named = dict(line.split("=")[::-1] for line in done.stdout.split())
    assert set(named.values()) <= set(NETWORKS)
    assert len(named) > 40
