"""Runs of which a bench times full training steps: from sampling to the update."""

import pathlib
import runpy
import tempfile
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from collab_jax import gapg
from collab_jax.bench import measure
from collab_jax.bench.work import Case
from collab_jax.models import hf
from collab_jax.rl import experiment, training

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
# The run whose step is timed, by shape: its config file, and what is changed in it.
STEPS: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": ("countdown_tiny.py", {}),
    # Like a peer that trains all weights in float32, by the rewards of what it has sampled.
    "smollm2-135m": (
        "svamp_smollm2.py",
        {
            "model.dtype": "float32",
            "decode.cache_dtype": "float32",
            "lora.rank": 0,
            "algorithm.decision": "sampled",
            "algorithm.advantage": "gapg",
            "max_new_tokens": 40,
            "optim.average": 0.0,
            "train.micro_rows": 8,
        },
    ),
}


class Training(NamedTuple):
    """The run that `python -m collab_jax.train` would have, in a scratch folder, as a case."""

    case: Case
    config: ConfigDict
    run: experiment.Run
    folder: tempfile.TemporaryDirectory  # is removed when nothing refers to it any more


def half_right(batch: gapg.Rollout) -> gapg.Rollout:
    """Returns the rollout, with axis D, as if every other response of each group were right."""
    right = np.broadcast_to(np.arange(batch.correct.shape[-1]) % 2 == 0, batch.correct.shape)
    known = np.ones(batch.cloud_known.shape, bool)
    return batch.replace(
        correct=right, called=np.zeros_like(right), cloud_correct=known, cloud_known=known
    )


class FullStep:
    """Full steps of a run, one at each call: sampling, verdicts, cloud answers and the update.

    Without a filter every prompt is learnt from, as by a peer that computes those without a signal
    too: the verdicts are made, and then replaced by those of `half_right`.
    """

    def __init__(self, run: experiment.Run):
        self._of_all = run.config.algorithm.filter == "none"
        self._steps = training.TrainingSteps(run)
        self._state = experiment.state_on_devices(run)
        self._cfg, self._step = run.cfg, 0
        self._prompts_per_step = run.config.prompts_per_step

    def __call__(self) -> float:
        """Takes one step; returns the tokens that it sampled."""
        collected = self._steps.collect(self._state.sampling_model, self._step)
        rollout = half_right(collected.rollout) if self._of_all else collected.rollout
        self._rollout = jax.tree.map(np.asarray, rollout)
        self._state, metrics = self._steps.update(self._state, rollout)
        self._row = self._steps.row(self._step, metrics, collected)
        self._step += 1
        return float(self._row["tokens"])

    def flop(self) -> float:
        """Returns the useful FLOP of the latest step: sampling, and the update's prompts."""
        with_gradient = (self._row["kept"] - self._row["no_signal"]) / self._prompts_per_step
        return (1 + 3 * with_gradient) * measure.rollout_flop(self._cfg, self._rollout)


def full_step(shape: str, overrides: dict[str, Any]) -> Training:
    """Returns the run of a shape in STEPS with these overrides, whose case is one full step.

    The run starts from the model's folder; each call of the case takes the next step.
    """
    config_file, changes = STEPS[shape]
    config = runpy.run_path(str(CONFIGS / config_file))["get_config"]()
    config.update_from_flattened_dict(changes | overrides)
    folder = tempfile.TemporaryDirectory()
    run = experiment.prepare(config, pathlib.Path(folder.name))
    step = FullStep(run)
    return Training(Case(step, step.flop), config, run, folder)


def save_of(run: experiment.Run, folder: pathlib.Path) -> None:
    """Writes the model that a run starts from as a Hugging Face folder, for the peers."""
    params = hf.load(run.folder, run.cfg, "float32")
    hf.save(folder, params, hf.read_config(run.folder), "float32", run.folder)
