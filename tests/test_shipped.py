"""The adapter that comes with the package: small, complete, as good as its published records."""

import json
import runpy
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from safetensors import safe_open

from collab_jax import records
from collab_jax.models import hf, lora
from collab_jax.tasks import rows

NAME = "smollm2-svamp"
DATA = "~/tensorflow_datasets"


def settings():
    return runpy.run_path(str(ROOT / "configs" / "svamp_smollm2.py"))["get_config"]()


def test_it_is_small_and_goes_with_its_config():
    folder, config = lora.folder_of(NAME), settings()
    assert {file.name for file in folder.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "collab_config.json",
    }
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 6e6
    assert sum(f.stat().st_size for f in hf.ASSETS.rglob("*") if f.is_file()) <= 9e6
    said = json.loads((folder / lora.CONFIG).read_text())
    assert (said["r"], said["lora_alpha"]) == (config.lora.rank, config.lora.alpha)
    assert sorted(said["target_modules"]) == sorted(config.lora.targets)
    with safe_open(folder / lora.WEIGHTS, "np") as file:
        assert {file.get_slice(key).get_dtype() for key in file.keys()} >= {"BF16"}  # noqa: SIM118
    calibrated = json.loads((folder / "collab_config.json").read_text())
    assert (calibrated["target"], calibrated["value"]) == ("rate", config.budget)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.usefixtures("smollm2_file")
def test_it_answers_as_published(tmp_path):
    """A quarter of the test: on this kind of machine to the letter, elsewhere nearly."""
    if not rows.find(DATA, "svamp_test"):
        pytest.skip(f"svamp_test.jsonl is not in {DATA}")
    published = records.read(ROOT / "docs" / "results" / "svamp" / "test.parquet")
    command = [sys.executable, "-m", "collab_jax.evaluate", "--split=test"]
    command += ["--config=configs/svamp_smollm2.py", f"--workdir={tmp_path}"]
    command += [f"--config.lora.start={NAME}", "--config.eval.prompts=250"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    found = records.read(tmp_path / "test.parquet")
    place = {key: row for row, key in enumerate(published["id"])}
    own = [place[key] for key in found["id"]]
    same = np.mean([a == b for a, b in zip(found["text"], published["text"][own], strict=True)])
    assert same > 0.9
    assert abs(np.mean(found["local_correct"]) - np.mean(published["local_correct"][own])) < 0.04
