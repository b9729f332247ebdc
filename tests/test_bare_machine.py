"""The library on a GPU machine that has torch, transformers and accelerate only."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bare_machine import make_site, run_bare


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_site(tmp_path_factory.mktemp("bare") / "site")


TRAIN = """
import importlib.util, json
from pathlib import Path
import numpy as np, torch
from accelerate import Accelerator
from modeling_m3ret import M3RetImageProcessor
from modeling_m3ret.data.loading import RandomViews, training_loader
from modeling_m3ret.data.sampler import SeededBatchSampler
from modeling_m3ret.pretraining.distributed import prepare_training
from modeling_m3ret.pretraining.objectives import build_objective
from modeling_m3ret.pretraining.optimisation import accumulate_gradients, build_optimiser, set_schedule
from modeling_m3ret.pretraining.run_config import RunConfig

class Record:
    def __init__(self, path):
        self.path = path
    def open(self):
        return self.path

records = []
for number in range(4):
    array = np.random.default_rng(number).integers(0, 256, (1 + 7 * (number % 2), 40, 40), dtype=np.uint8)
    np.save(f"{number}.npy", array)
    records.append(Record(Path(f"{number}.npy")))
small = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
losses = {}
for objective in ("mae", "simdino", "mae+simdino"):
    run = RunConfig(objective=objective, preset="vitt", model=small, size=32, local_size=16, batch_size=4, steps=2)
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    built, _ = build_objective(run)
    model, optimiser = prepare_training(accelerator, built.train(), build_optimiser(built, run))
    processor = M3RetImageProcessor(size=32)
    views = RandomViews(records, processor, views=built.views)
    packs = iter(training_loader(views, SeededBatchSampler(["a"] * 4, 4, seed=0), 1, built.plan))
    losses[objective] = []
    for step in range(2):
        set_schedule(optimiser, run, step, 1)
        means, _ = accumulate_gradients(accelerator, model, [next(packs)], processor)
        optimiser.step()
        optimiser.zero_grad()
        built.after_step(step, 2)
        losses[objective].append(float(means["loss"]))
absent = [name for name in ("PIL", "pyarrow", "scipy", "pydicom") if importlib.util.find_spec(name) is None]
print(json.dumps({"losses": losses, "absent": absent}))
"""


def test_every_objective_trains_without_other_packages(site: Path, tmp_path: Path) -> None:
    ran = run_bare(site, ["-c", TRAIN], tmp_path)
    assert ran.returncode == 0, ran.stderr
    printed = json.loads(ran.stdout.splitlines()[-1])
    assert printed["absent"] == ["PIL", "pyarrow", "scipy", "pydicom"]
    assert printed["losses"].keys() == {"mae", "simdino", "mae+simdino"}
    assert all(-10 < loss < 10 and first != loss for first, loss in printed["losses"].values())
