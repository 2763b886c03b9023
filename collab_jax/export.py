"""Export: the last checkpoint of a run as a Hugging Face folder, for transformers, vLLM and others.

    python -m collab_jax.export --config FILE --workdir RUN --out FOLDER [--adapter]

A run with `config.lora` is merged into its model, or, with --adapter, written as an adapter that
PEFT and vLLM load. In an empty workdir the adapter that `config.lora.start` names is exported, as
one that is bundled. The folder gets a model card (README.md) that says how to call the model and,
where the run has its report, what was measured.
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
from collab_jax.routing import collab_config
from collab_jax.runtime import cli, files
from collab_jax.runtime.errors import UserError


def export_checkpoint(run: Run, out: pathlib.Path, *, adapter: bool) -> int:
    """Writes the run's last checkpoint to `out` and returns its step.

    adapter: the adapter alone, else the whole model. Where a run that starts from an adapter has no
    checkpoint, its start is written, as step 0. Raises UserError where there is nothing to export,
    or no adapter, or `out` cannot be written.
    """
    config = run.config
    step = run.checkpoints.latest() or 0
    if not step and not config.lora.start:
        raise UserError(
            f"{run.workdir} holds no checkpoint: train first, with this --workdir and settings"
        )
    if adapter and not config.lora.rank:
        raise UserError(
            "--adapter: this run trained the whole model (config.lora.rank=0): "
            "export it without --adapter"
        )
    state = experiment.load_state(run)
    params = state.final_params
    try:
        if adapter:
            name, _ = hf.split_revision(config.model.path)
            assert state.frozen is not None
            lora.save(
                out,
                params,
                run.cfg,
                state.frozen,
                config.lora,
                name=name,
                revision=hf.commit(run.folder),
            )
            hf.copy_tokenizer(run.folder, out)
        else:
            if config.lora.rank:
                base = hf.load(run.folder, run.cfg, config.model.param_dtype)
                params = lora.merge(base, params, run.cfg)
            hf.save(out, params, hf.read_config(run.folder), config.model.param_dtype, run.folder)
        if not (run.folder / hf.GENERATION).is_file():
            hf.save_generation_config(out, run.text.eos_ids, run.text.pad_id)
        if not step:
            _copy_calibration(lora.folder_of(config.lora.start), out)
        files.write_text(out / "README.md", model_card(run, step, adapter=adapter))
    except OSError as error:
        raise UserError(f"cannot write to {out} ({error.strerror}): choose another --out") from None
    return step


def _copy_calibration(adapter: pathlib.Path, out: pathlib.Path) -> None:
    """Copies the biases of an adapter that is exported as it is, where it has them."""
    calibration = adapter / collab_config.NAME
    if calibration.is_file():
        files.write_text(out / collab_config.NAME, calibration.read_text())


def model_card(run: Run, step: int, *, adapter: bool) -> str:
    """Returns README.md of the exported folder."""
    config = run.config
    base, _ = hf.split_revision(config.model.path)
    name = pathlib.Path(base).name
    trained = f"budget {config.budget:g}, {step} steps, seed {config.seed}"
    if not step:
        trained = f"the adapter {config.lora.start} as it was given"
    return f"""---
base_model: {base}
library_name: {"peft" if adapter else "transformers"}
pipeline_tag: text-generation
tags: [collab_jax, device-cloud, routing]
---

# {name}, which knows when to ask the cloud

Post-trained by collab_jax ({config.task.name}, {trained}) to answer what it can and to
end with `{run.text.marker}` where a larger model should answer instead.

## How to call it

Prompt it by its chat template with {json.dumps(config.task.prompt)}{_system(config)}. A response \
is `<think> ... </think><answer> ... </answer>`, or it ends with the
marker: then send the question to the cloud. {_first_token_of_a_call(run)}
`python -m collab_jax.calibrate --records RUN/after.parquet --rate 0.3 --out FOLDER` finds the \
bias for a budget and writes
collab_config.json beside this file.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
{_loading(config.model.path, adapter=adapter)}
messages = [{{"role": "user", "content": "..."}}]
prompt = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
output = model.generate(**prompt, max_new_tokens={config.max_new_tokens}, do_sample=False)
print(tokenizer.decode(output[0]))
```

## What was measured

{_measured(run)}
"""


def _loading(path: str, *, adapter: bool) -> str:
    """Returns the code that loads what was exported of the base model at `path`."""
    if not adapter:
        return 'model = AutoModelForCausalLM.from_pretrained("FOLDER")'
    file = hf.gguf_file(path)
    if file is None:
        return 'model = AutoModelForCausalLM.from_pretrained("FOLDER")  # needs peft installed'
    return "\n".join(
        [
            "from peft import PeftModel",
            "",
            'base = AutoModelForCausalLM.from_pretrained("FOLDER OF THE BASE", '
            f'gguf_file="{file.name}")',
            'model = PeftModel.from_pretrained(base, "FOLDER")',
        ]
    )


def _system(config: ConfigDict) -> str:
    """Returns which system prompt goes with the prompt, where there is one."""
    system = config.task.system
    return f"\nand the system prompt {json.dumps(system)}" if system else ""


def _first_token_of_a_call(run: Run) -> str:
    """Returns which token begins a call, for whoever sets a bias on it."""
    token_id = run.text.decision_id
    if token_id is None:
        return (
            "The call is plain text, which several tokens may begin, so that a server's "
            "`logit_bias` does not set the share of calls."
        )
    token = run.text.tokenizer.convert_ids_to_tokens(token_id)
    return (
        f"The call begins with one token, `{token}` (id {token_id}); a `logit_bias` on it,\n"
        "before the answer opens, sets the share of calls."
    )


def _measured(run: Run) -> str:
    """Returns the table of the run's report, where it has one."""
    file = run.workdir / "report.json"
    if not file.exists():
        return "The run had no report: nothing is known of how good it is."
    report = json.loads(file.read_text())
    machine = ", ".join(f"{key} {value}" for key, value in report["machine"].items())
    return (
        f"{report['after']['n']} held-out prompts of {run.config.task.name}, "
        f"before and after training ({machine}):\n\n{run_report.markdown_table(report)}"
    )


def main(config: ConfigDict, workdir: pathlib.Path, out: pathlib.Path, adapter: bool) -> int:
    """Exports the run in `workdir` to the folder `out`: a model, or its adapter alone."""
    step = export_checkpoint(experiment.prepare(config, workdir), out, adapter=adapter)
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
