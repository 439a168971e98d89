"""LowRank under DDP, in two real processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import copy, json, os, sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
import lightning as L, torch
from slimnets.lowrank import LowRank, LowRankPair, factorize
from tests.support import Classifier, small_data, small_network

torch.set_num_threads(1)
folder, rank = Path(sys.argv[1]), int(os.environ.get("LOCAL_RANK", 0))
L.seed_everything(rank, verbose=False)  # the processes start from different weights
module = Classifier(small_network(norm=False))
if rank:  # and from other ranks
    with torch.no_grad():
        module.network[7].weight[8:] = 0

def pairs(net):
    return {n: m.rank for n, m in net.named_modules() if isinstance(m, LowRankPair)}

alone = pairs(factorize(copy.deepcopy(module), energy=0.8))
trainer = L.Trainer(max_epochs=2, accelerator="cpu", devices=2, strategy="ddp", logger=False,
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    callbacks=[LowRank(energy=0.8)], default_root_dir=folder)
trainer.fit(module, small_data())
total = sum(float(p.detach().double().sum()) for p in module.parameters())
found = {"alone": alone, "pairs": pairs(module), "total": total}
(folder / f"{trainer.global_rank}.json").write_text(json.dumps(found))
# Lightning leaves it to the end of the process, which its threads may abort
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_processes_with_different_weights_agree_on_the_ranks(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    root = Path(__file__).parents[2]
    subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        check=True,
        timeout=800,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["alone"] != second["alone"]  # or the test shows nothing
    assert first["pairs"] == second["pairs"] == first["alone"]
    assert first["total"] == second["total"]
