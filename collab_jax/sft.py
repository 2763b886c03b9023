"""Warm start: supervised tuning on demonstrations, before training by rewards.

    python -m collab_jax.sft --config configs/countdown_tiny_sft.py --workdir FOLDER

writes a Hugging Face folder, to be named by `config.model.path` in training; with `config.lora`, an
adapter as PEFT has it, for `config.lora.start`. Tuning brings the format and the marker within
reach of what the model samples. It starts from `config.model.path`; with `config.sft.architecture`
the model and its vocabulary are made from nothing. The demonstrations are the task's, those of a
file, or the model's own (`config.sft.source`); with `config.sft.relabel_steps` the tuned model's
own attempts teach it when to call (`rl/warm_start.py`).

The same command resumes, bit for bit on a CPU, whatever stopped it; SIGTERM or Ctrl-C saves and
exits with status 75. Several hosts tune as they train (docs/scale.md). The last file is sft.json:
what the tuned model does on `config.sft.check_prompts` prompts of the validation split.
"""

from collab_jax.runtime import process

process.restart_with_allocator(__name__)

import json
import pathlib
import sys

from ml_collections import ConfigDict

from collab_jax.rl import claims, experiment, reach, settings, warm_start
from collab_jax.runtime import cli, files, hosts
from collab_jax.tasks import judge, make_task


def run(config: ConfigDict, workdir: pathlib.Path) -> int:
    """Tunes, tries the tuned model, and returns the exit status; sft.json is the last file."""
    stop = process.GracefulStop()
    start = None
    with experiment.prepared_in_turn(config, workdir / warm_start.FOLDER):
        settings.check_warm_start(config)
        claims.make_workdir(workdir)  # now, not after hours
        if not warm_start.is_finished(config, workdir):
            task = judge.judged(config, make_task(config), experiment.store_path(config, workdir))
            start = warm_start.prepare(config, workdir, task)
    with experiment.held(workdir):
        if start is None:
            print(f"{workdir} is finished: its figures are in {warm_start.FIGURES}")
        else:
            make(start, stop)
        if hosts.is_first():
            warm_start.discard_checkpoints(workdir)  # a kill may have come before
    hosts.gathered("that it is done", None, hosts.FOREVER)
    return 0


def make(start: warm_start.WarmStart, stop: process.GracefulStop) -> None:
    """Tunes and tries the model; the first host writes what comes of it."""
    config, workdir = start.config, start.workdir
    params = warm_start.tuned(start, stop)
    warm_start.write(start, params)
    figures: dict[str, float | None] = {"steps": config.sft.steps}
    if start.check_examples:
        figures |= reach.measure(start.respondent, start.model(params), start.check_examples)
        print(reach.format_reach(figures))
        for warning in reach.warnings(figures):
            print(f"warning: {warning}", file=sys.stderr)
    if hosts.is_first():
        files.write_text(workdir / warm_start.FIGURES, json.dumps(figures, indent=2) + "\n")
    print(f"wrote {workdir}")


if __name__ == "__main__":
    cli.run_with_config(run, several_hosts=True)
