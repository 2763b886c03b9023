"""Warm start: supervised tuning on demonstrations, so that format and marker are within reach of
exploration.

    python -m collab_jax.sft --config configs/countdown_tiny_sft.py --workdir FOLDER

writes a Hugging Face folder. With `config.sft.architecture` the model and its vocabulary are made
from nothing, else tuning starts from `config.model.path`. The demonstrations are the task's, those
of a file, or the model's own (`config.sft.source`; `demonstrations.py`). The same command gives the
same weights on the same machine.

Last it writes sft.json: what the tuned model does on some training prompts. Training can only learn
from calls that occur.
"""

from collab_jax.runtime import process

process.restart_with_allocator(__name__)

import json
import pathlib
import sys
import tempfile

import jax
from ml_collections import ConfigDict

from collab_jax.models import decoder, hf, lora
from collab_jax.models import text as text_lib
from collab_jax.rl import experiment, rollout, warm_start
from collab_jax.runtime import cli
from collab_jax.runtime.errors import UserError
from collab_jax.tasks import judge, make_task


def run(config: ConfigDict, workdir: pathlib.Path) -> int:
    """Tunes, and writes the model folder to `workdir`, with sft.json as its last file."""
    warm_start.check(config)
    task = judge.judged(config, make_task(config), experiment.store_path(config, workdir))
    if config.sft.source == "task" and task.demonstrations is None:
        raise UserError(
            f"task {task.name!r} makes no demonstrations: set config.sft.source to self, or to file"
        )
    experiment.make_workdir(workdir)  # now, not after hours
    with tempfile.TemporaryDirectory() as scratch:
        if config.sft.architecture:
            tokenizer_folder, hf_config = pathlib.Path(scratch), dict(config.sft.architecture)
            words = text_lib.word_tokenizer(
                config.sft.words, config.text.pad, config.text.eos[0], "<unk>"
            )
            words.save_pretrained(tokenizer_folder)
            cfg = hf.config_from_hf(hf_config, config.model.dtype)
            params = decoder.init(cfg, jax.random.key(config.seed))
        else:
            tokenizer_folder = hf.locate(config.model.path)
            hf_config = hf.read_config(tokenizer_folder)
            cfg = hf.config_from_hf(hf_config, config.model.dtype, config.train.remat)
            lora.configure(cfg, config.lora)  # refused now, not after the sampling
            params = hf.load(tokenizer_folder, cfg, config.model.param_dtype)
        text = text_lib.load(tokenizer_folder, config.text)
        sample = rollout.make_sampler(
            cfg, text, config, group=config.group, temperature=config.temperature
        )
        source = warm_start.demonstration_stream(sample, params, text, task, config, workdir)
        params = warm_start.tune(params, cfg, warm_start.batches(source, text, config), config)
        hf.save(workdir, params, hf_config, config.model.param_dtype, tokenizer_folder)
    figures = {"steps": config.sft.steps}
    if config.sft.check_prompts:
        examples = experiment.load_examples(task, text, config, "train")[
            -config.sft.check_prompts :
        ]
        figures |= warm_start.reach(sample, params, text, task, examples, config)
        print(warm_start.format_reach(figures))
        for warning in warm_start.warnings(figures):
            print(f"warning: {warning}", file=sys.stderr)
    (workdir / "sft.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(f"wrote {workdir}")
    return 0


if __name__ == "__main__":
    cli.run_with_config(run)
