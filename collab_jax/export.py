"""Export: the last checkpoint of a run as a Hugging Face folder, for `transformers`, vLLM and the
like.

    python -m collab_jax.export --config configs/countdown_tiny.py --workdir RUN --out FOLDER [--adapter]

A run with `config.lora` is merged into its model, or, with --adapter, written as an adapter that
PEFT and vLLM load. With a model card (README.md) that says how to call it and, where the run has
its report, what was measured.
"""

from collab_jax.runtime import process

process.restart_with_allocator(__name__)

import json
import pathlib

from absl import flags
from ml_collections import ConfigDict

from collab_jax.models import hf, lora
from collab_jax.reports import run as run_report
from collab_jax.rl import experiment
from collab_jax.rl.experiment import Run
from collab_jax.runtime import cli
from collab_jax.runtime.errors import UserError


def model_card(run: Run, step: int, adapter: bool) -> str:
    """README.md of the exported folder."""
    config, text = run.config, run.text
    begins = "The call is plain text, which several tokens may begin, so that a server's `logit_bias` does not set the share of calls."
    if text.decision_id is not None:
        begins = (
            f"The call begins with one token, `{text.tokenizer.convert_ids_to_tokens(text.decision_id)}` (id {text.decision_id}); a "
            "`logit_bias` on it,\nbefore the answer opens, sets the share of calls."
        )
    example = json.dumps(config.task.prompt)
    file = run.workdir / "report.json"
    measured = "The run had no report: nothing is known of how good it is."
    if file.exists():
        figures = json.loads(file.read_text())
        rows = [line for line in run_report.markdown_table(figures).splitlines() if line]
        measured = (
            f"{figures['after']['n']} held-out prompts of {config.task.name}, before and after training "
            f"({', '.join(f'{key} {value}' for key, value in figures['machine'].items())}):\n\n"
            + "\n".join(rows)
        )
    return f"""---
base_model: {config.model.path}
library_name: {"peft" if adapter else "transformers"}
pipeline_tag: text-generation
tags: [collab_jax, device-cloud, routing]
---

# {pathlib.Path(config.model.path).name}, which knows when to ask the cloud

Post-trained by collab_jax ({config.task.name}, budget {config.budget:g}, {step} steps, seed {config.seed}) to answer what it can and to
end with `{text.marker}` where a larger model should answer instead.

## How to call it

Prompt it by its chat template with {example}. A response is `<think> ... </think><answer> ... </answer>`, or it ends with the
marker: then send the question to the cloud. {begins}
`python -m collab_jax.calibrate --records RUN/after.parquet --rate 0.3 --out FOLDER` finds the bias for a budget and writes
collab_config.json beside this file.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer, model = (kind.from_pretrained("FOLDER") for kind in (AutoTokenizer, AutoModelForCausalLM)){adapter * "  # needs peft installed"}
messages = [{{"role": "user", "content": "..."}}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(tokenizer.decode(model.generate(**prompt, max_new_tokens={config.max_new_tokens}, do_sample=False)[0]))
```

## What was measured

{measured}
"""


def write(run: Run, out: pathlib.Path, adapter: bool) -> int:
    """Writes the run's last checkpoint to `out`, a model or its adapter alone; returns its step."""
    config = run.config
    step = run.checkpoints.latest()
    if step is None:
        raise UserError(
            f"{run.workdir} holds no checkpoint: train first, with this --workdir and these settings"
        )
    if adapter and not config.lora.rank:
        raise UserError(
            "--adapter: this run trained the whole model (config.lora.rank=0): export it without --adapter"
        )
    params = experiment.load_state(run).final_params
    try:
        if adapter:
            lora.save(out, params, config.lora, config.model.path)
            hf.copy_tokenizer(run.folder, out)
        else:
            if config.lora.rank:
                base = hf.load(run.folder, run.cfg, config.model.param_dtype)
                params = lora.merge(base, params, run.cfg.lora_scale)
            hf.save(out, params, hf.read_config(run.folder), config.model.param_dtype, run.folder)
        if not (run.folder / hf.GENERATION).is_file():
            hf.save_generation_config(out, run.text.eos_ids, run.text.pad_id)
        (out / "README.md").write_text(model_card(run, step, adapter), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write to {out} ({error.strerror}): choose another --out") from None
    return step


def main(config: ConfigDict, workdir: pathlib.Path, out: pathlib.Path, adapter: bool) -> int:
    """Exports the run in `workdir` to the folder `out`: a model, or its adapter alone."""
    step = write(experiment.prepare(config, workdir), out, adapter)
    print(f"wrote step {step} to {out}")
    return 0


if __name__ == "__main__":
    out = flags.DEFINE_string("out", None, "Folder to write; made if absent.", required=True)
    adapter = flags.DEFINE_bool(
        "adapter", False, "Write the adapter alone, as PEFT has it, instead of the merged model."
    )
    cli.run_with_config(
        lambda config, workdir: main(
            config, workdir, pathlib.Path(out.value).expanduser(), adapter.value
        )
    )
