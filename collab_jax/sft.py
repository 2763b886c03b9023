"""Warm start: supervised tuning on demonstrations, before training by rewards.

    python -m collab_jax.sft --config configs/countdown_tiny_sft.py --workdir FOLDER

writes a Hugging Face folder. Tuning brings the format and the marker within reach of what the model
samples. It starts from `config.model.path`; with `config.sft.architecture` the model and its
vocabulary are made from nothing. The demonstrations are the task's, those of a file, or the model's
own (`config.sft.source`; `rl/demonstrations.py`). The same command gives the same weights on the
same machine.

The last file is sft.json: what the tuned model does on some training prompts. Training can only
learn from calls that occur.
"""

from collab_jax.runtime import process

process.restart_with_allocator(__name__)

import json
import pathlib
import sys
import tempfile

from ml_collections import ConfigDict

from collab_jax.models import hf
from collab_jax.models import text as text_lib
from collab_jax.models.decoder import Params
from collab_jax.models.sampler import Sampler
from collab_jax.models.text import Text
from collab_jax.rl import experiment, rollout, warm_start
from collab_jax.runtime import cli, files
from collab_jax.runtime.errors import UserError
from collab_jax.tasks import Task, judge, make_task


def write_tuned_model(
    config: ConfigDict, workdir: pathlib.Path, task: Task
) -> tuple[Params, Text, Sampler]:
    """Tunes, and writes the model folder to `workdir`; returns the tuned params and their parts."""
    with tempfile.TemporaryDirectory() as scratch:
        start = warm_start.starting_model(config, pathlib.Path(scratch))
        text = text_lib.load(start.tokenizer_folder, config.text)
        sampler = rollout.make_sampler(
            start.cfg, text, config, group=config.group, temperature=config.temperature
        )
        source = warm_start.demonstration_stream(sampler, start.params, text, task, config, workdir)
        batches = warm_start.batches(source, text, config)
        params = warm_start.tune(start.params, start.cfg, batches, config)
        param_dtype, tokenizer_folder = config.model.param_dtype, start.tokenizer_folder
        hf.save(workdir, params, start.hf_config, param_dtype, tokenizer_folder)
    return params, text, sampler


def run(config: ConfigDict, workdir: pathlib.Path) -> int:
    """Tunes, tries the tuned model, and returns the exit status; sft.json is the last file."""
    warm_start.check_warm_start(config)
    task = judge.judged(config, make_task(config), experiment.store_path(config, workdir))
    if config.sft.source == "task" and task.demonstrations is None:
        raise UserError(
            f"task {task.name!r} makes no demonstrations: set config.sft.source to self, or to file"
        )
    experiment.make_workdir(workdir)  # now, not after hours
    params, text, sampler = write_tuned_model(config, workdir, task)
    figures: dict[str, float | None] = {"steps": config.sft.steps}
    if config.sft.check_prompts:
        examples = experiment.load_examples(task, text, config, "train")[
            -config.sft.check_prompts :
        ]
        figures |= warm_start.measure_reach(sampler, params, text, task, examples, config)
        print(warm_start.format_reach(figures))
        for warning in warm_start.warnings(figures):
            print(f"warning: {warning}", file=sys.stderr)
    files.write_text(workdir / "sft.json", json.dumps(figures, indent=2) + "\n")
    print(f"wrote {workdir}")
    return 0


if __name__ == "__main__":
    cli.run_with_config(run)
