"""The page of the paper's tables says what its figures say, and compares only what can be."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

PAPER = Path(__file__).parents[2] / "examples" / "paper"
SETTINGS = {
    "epochs": 10.0,
    "reference_epochs": 33,
    "held_out": 0,
    "answers": 2,
    "batch_size": 128,
    "learning_rate": None,
    "device": "cpu",
    "precision": "32-true",
    "batches": None,
    "reference": "vgg19.safetensors",
    "images": "0123456789ab",
}


def write(
    folder: Path,
    run: str,
    accuracy: float,
    seed: int = 0,
    epochs: float = 10,
    speed: float | None = None,
    processor: str = "some",
    gpu: bool = False,
    **settings: Any,
) -> None:
    forms = {"float32": 2_000_000, "int8": 500_000}
    if "resnet10" in run:
        forms["int6"] = 250_000
    figures = {
        "run": run,
        "seed": seed,
        "epochs": epochs,
        "settings": {**SETTINGS, **settings},
        "files": {form: {"bytes": n, "accuracy": accuracy} for form, n in forms.items()},
        "dense_bytes": 80_000_000,
        "machine": {"processor": "some", "torch": "2", **({"gpu": "a GPU"} if gpu else {})},
        **dict.fromkeys(("weights", "nonzeros", "macs", "effective_macs"), 1000 + seed),
    }
    if speed:
        figures["speed"] = {
            **{batch: {"times_as_fast": {"median": speed}} for batch in ("1", "64")},
            "machine": {"processor": processor, "instructions": "AVX2", "torch": "2"},
        }
    (folder / f"{run}-seed{seed}.json").write_text(json.dumps(figures))


def results(*folders: Path) -> list[str]:
    """What results.py says, of each folder in turn."""
    program = """
import sys
import results
for folder in sys.argv[1:]:
    try:
        results.main(["--folder", folder, "--out", folder, "--data", "made up"])
    except SystemExit as stop:
        print(stop)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, folders)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PAPER)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_page(tmp_path: Path) -> None:
    write(tmp_path, "vgg19", 0.9, epochs=33, speed=1)
    write(tmp_path, "vgg19-then-gradual75", 0.88, epochs=33.5, speed=3)
    pruned = "gradual75global-distilled3"
    write(tmp_path, f"vgg19-then-{pruned}-then-{pruned}", 0.895, epochs=33.5, speed=3)
    write(tmp_path, "resnet10-medium-gradualtapered-more-distilled3", 0.891, speed=20, answers=4)
    write(tmp_path, "resnet10-small-gradualtapered-distilled", 0.88, answers=1)
    write(
        tmp_path,
        "vgg19-then-spatialpaper-distilled3-then-distilled3-then-distilled3",
        0.91,
        epochs=33,
        speed=1.5,
        processor="another",
    )
    for seed, (alone, taught) in enumerate(((0.6, 0.64), (0.61, 0.64), (0.62, 0.65))):
        write(tmp_path, "snn-1k", alone, seed)
        write(tmp_path, "snn-1k-distilled", taught, seed, speed=seed)
        if seed < 2:
            write(tmp_path, "cnn-1k", alone, seed)
            write(tmp_path, "cnn-1k-distilled", taught, seed)
    write(tmp_path, "cnn-1k-distilled-then-gradual75-distilled", 0.5, epochs=14, speed=7)
    assert results(tmp_path) == [str(tmp_path / "results.md")]
    page = (tmp_path / "results.md").read_text()
    for line in (
        f"| gradual, 75 %: vgg19-then-{pruned}-then-{pruned}, float32 | 0 points | -0.5 points "
        "| 33.5*, 1 | 0.5 points |",
        "2.439 times fewer bytes, 1.8 times as fast at batch 64 | 1 points, 40 times fewer bytes, "
        "1.5 times as fast at batch 64† | 33, 1 | 0.3 times as fast at batch 64 |",
        "| 2,000,000 (40x) | 500,000 (160x) | 1.5† | 1.5† |",
        "on one thread (some with AVX2, torch 2).",
        "Those marked † were measured on another with AVX2, torch 2.",
        "| +3.33 points (by seed: +4.00, +3.00, +3.00), spread 1.00 | 10, 3 | nothing |",
        "| +3.50 points (by seed: +4.00, +3.00) | 10, 2 | more seeds |",
        "| nin, distilled against alone | above 0 points, beyond the spread | not trained | - |",
        "the goal: resnet10-medium-gradualtapered-more-distilled3, int6 | 500 times fewer bytes, "
        "99 % of the accuracy, 20 times as fast at batch 1, 10 times as fast at batch 64 | 320 ",
        "| vgg19 | 90.00 | 100.0% | 33, 1 | - | - | 2,000,000 (40x) | - | 1.0 | 1.0 |",
        "| 89.10 | 99.0% | 10, 1 | 89.10 | 99.0% | 2,000,000 (40x) | 250,000 (320x) | 20.0 |",
        "| snn-1k-distilled | 64.33 ± 0.58 | 71.5% | 10, 3 |",
        "| cnn-1k-distilled-then-gradual75-distilled | 50.00 | 55.6% | 14, 1 | 50.00 | 55.6% "
        "| 2,000,000 (40x) | 500,000 (160x) | 7.0 | 7.0 |",
        "| cnn-1k-distilled | 64.00 ± 0.00 | 71.1% | 10, 2 | 64.00 ± 0.00 | 71.1% "
        "| 2,000,000 (40x) | 500,000 (160x) | not timed | not timed |",
        "all --only snn-1k-distilled --answers 2 --device cpu --epochs 10 --reference "
        "vgg19.safetensors --reference-epochs 33 --seeds 3\n",
        f'`python examples/paper/results.py --folder FOLDER --data "made up" --out {tmp_path}`',
    ):
        assert line in page
    commands = page[page.index("## Commands") :]
    assert commands.index("--only cnn-1k --") < commands.index("--only cnn-1k-distilled --")
    assert commands.index("--only cnn-1k-distilled --") < commands.index("cnn-1k-distilled-then-")
    assert commands.index("resnet10-small-") < commands.index("-more-distilled3")  # its teacher
    pictures = [line for line in page.splitlines() if line.startswith("![")]
    assert len(pictures) == 4
    for picture in pictures:
        assert (tmp_path / picture[picture.index("(") + 1 : -1]).stat().st_size > 1000


def test_all_is_compared_with_the_reference_trained_on_where_that_is_better(tmp_path: Path) -> None:
    trained = {"reference": None, "reference_epochs": 100, "answers": 0}
    write(tmp_path, "vgg19", 0.9, epochs=100, gpu=True, batch_size=512, **trained)
    write(tmp_path, "vgg19-then-dense", 0.91, epochs=110, gpu=True, **trained)
    for share, accuracy, epochs in ((75, 0.905, 110), (95, 0.906, 111)):
        pruned = f"vgg19-then-gradual{share}global-distilled2"
        write(tmp_path, pruned, accuracy, epochs=epochs, **trained)
    assert results(tmp_path) == [str(tmp_path / "results.md")]
    page = (tmp_path / "results.md").read_text()
    for line in (
        "Trained on: a GPU, torch 2; some, torch 2.",
        "**The reference, `vgg19-then-dense`, classifies 91.00% of the test images correctly,",
        "| vgg19 | 90.00 | 98.9% | 100, 1 |",
        "| gradual, 75 %: vgg19-then-gradual75global-distilled2, float32 | 0 points | -0.5 points "
        "| 110, 1 | 0.5 points |",
        "| -0.4 points | 111*, 1 | nothing |",
    ):
        assert line in page
    assert "The network that is kept" not in page
    commands = [line for line in page.splitlines() if line.startswith("    python")]
    assert commands[0].endswith(
        "--only vgg19 --batch-size 512 --device cpu --reference-epochs 100 --seeds 1"
    )
    assert len(commands) == 3  # what one other network begins with comes before what two do
    assert "--only vgg19-then-dense --" in commands[1]


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    unlike: list[tuple[str, dict[str, Any], str]] = [
        ("snn-1k", {"images": "ba98"}, "figures of all with unequal images"),
        ("snn-1k", {"reference_epochs": 200}, "figures of all with unequal reference_epochs"),
        ("snn-1k", {"batches": 2}, "figures of all with unequal batches"),
        ("cnn-1k", {"batch_size": 64}, "figures of cnn-1k with unequal batch_size"),
        ("cnn-1k", {"learning_rate": 0.5}, "figures of cnn-1k with unequal learning_rate"),
    ]
    folders = [tmp_path / str(number) for number in range(len(unlike) + 1)]
    for folder in folders:
        folder.mkdir()
        write(folder, "cnn-1k", 0.6)
    for folder, (run, settings, _) in zip(folders, unlike, strict=False):
        write(folder, "vgg19", 0.9, epochs=33)
        write(folder, run, 0.6, seed=1, **settings)
    said = results(*folders)
    for line, start in zip(said, [*(start for *_, start in unlike), "--folder"], strict=True):
        assert line.startswith(start)
    assert "no figures of vgg19 there" in said[-1]
