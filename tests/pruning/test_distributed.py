"""GradualPrune under DDP, in two real processes."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from slimnets import GradualPrune
from tests.support import Classifier, small_data, small_network

SCRIPT = """
import hashlib, json, os, sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
import lightning as L, torch
from slimnets import ExactResume, GradualPrune
from slimnets.pruning import magnitude, random
from tests.support import Classifier, small_data, small_network
from torch.utils.data import DataLoader, DistributedSampler

folder, criterion = Path(sys.argv[1]), {"magnitude": magnitude, "random": random}[sys.argv[2]]
torch.set_num_threads(1)

class Hashes(L.Callback):
    def __init__(self):
        self.seen = []
    def on_train_batch_end(self, trainer, pl_module, *_):
        masks = b"".join(m.numpy().tobytes() for m in prune.masks.values())
        weights = b"".join(p.detach().numpy().tobytes() for p in pl_module.parameters())
        self.seen.append([hashlib.sha256(b).hexdigest() for b in (masks, weights)])

L.seed_everything(0, verbose=False)
module = Classifier(small_network(norm=False))
L.seed_everything(int(os.environ.get("LOCAL_RANK", 0)), verbose=False)  # unequal seeds
prune, hashes = GradualPrune(0.9, criterion=criterion), Hashes()
dataset = small_data().dataset
turns = DistributedSampler(dataset, 2, int(os.environ.get("LOCAL_RANK", 0)), shuffle=False)
trainer = L.Trainer(max_epochs=3, accelerator="cpu", devices=2, strategy="ddp", logger=False,
    use_distributed_sampler=False,
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    callbacks=[prune, hashes, ExactResume()], default_root_dir=folder)
trainer.fit(module, DataLoader(dataset, batch_size=4, sampler=turns))
trainer.save_checkpoint(folder / "last.ckpt")
(folder / f"{trainer.global_rank}.json").write_text(json.dumps(hashes.seen))
if trainer.is_global_zero:
    torch.save(module.state_dict(), folder / "weights.pt")
# Lightning leaves it to the end of the process, which its threads may abort
torch.distributed.destroy_process_group()
"""


def run(folder: Path, criterion: str) -> None:
    script = folder / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    subprocess.run(
        [sys.executable, str(script), str(folder), criterion],
        check=True,
        timeout=800,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("criterion", ["magnitude", "random"])
def test_both_ranks_have_the_same_masks_and_weights_after_every_step(
    tmp_path, make_trainer, criterion
):
    run(tmp_path, criterion)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert len(first) == 18
    assert first == second
    assert len({masks for masks, _ in first}) > 5
    weights = torch.load(tmp_path / "weights.pt")
    assert int((weights["network.7.weight"] == 0).sum()) == round(0.9 * 8192)
    assert len(torch.load(tmp_path / "last.ckpt")["callbacks"]["ExactResume"]["ranks"]) == 2
    if criterion == "magnitude":
        torch.manual_seed(0)
        alone = Classifier(small_network(norm=False))
        trainer = make_trainer(max_epochs=3, callbacks=[GradualPrune(0.9)])
        # the two ranks take turns, so that together they see these batches of eight
        trainer.fit(alone, small_data(batch_size=8), small_data(8))
        for name, value in alone.state_dict().items():
            torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-5)
