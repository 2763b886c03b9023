"""Model cards: what lies beside an exported model and says how to call it, and how good it is."""

import json
import pathlib
import shlex

from ml_collections import ConfigDict

from collab_jax.models import hf
from collab_jax.models.text import DATE
from collab_jax.reports import run as run_report
from collab_jax.rl.experiment import Run
from collab_jax.routing import collab_config

LINE = "\n"


def model_card(run: Run, step: int, *, adapter: bool) -> str:
    """Returns README.md of the exported folder."""
    config = run.config
    return f"""{_head(run, step, "peft" if adapter else "transformers")}
{_prompting(run)} {_first_token_of_a_call(run)}
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


def gguf_card(run: Run, step: int, file: str, kind: str, calibration_folder: pathlib.Path) -> str:
    """Returns the model card of a GGUF file.

    file: its name. kind: of its matrices. calibration_folder: where the run's collab_config.json
    lies, if there is one.
    """
    config, token = run.config, run.text.decision_id
    bias = _bias(run, calibration_folder)
    date = ""
    if "date_string" in str(run.text.tokenizer.chat_template):  # it would write today's
        date = f" --chat-template-kwargs {shlex.quote(json.dumps({'date_string': DATE}))}"
    system = [{"role": "system", "content": config.task.system}] if config.task.system else []
    request = {
        "messages": [*system, {"role": "user", "content": "..."}],
        "max_tokens": config.max_new_tokens,
        "temperature": 0,
    }
    if bias is not None:
        request["logit_bias"] = {str(token): bias}
    settings = [
        f"FROM ./{file}",
        "PARAMETER temperature 0",
        "PARAMETER repeat_penalty 1",
        f"PARAMETER num_predict {config.max_new_tokens}",
        *(f'SYSTEM """{message["content"]}"""' for message in system),
    ]
    name = pathlib.Path(file).stem.lower()
    return f"""{_head(run, step, "gguf")}
{_prompting(run)} {_first_token_of_a_call(run)}
{_about_bias(run, bias, kind)}

With llama.cpp. The bias goes into each request: its server drops one that it is started with.

```sh
llama-server -m {file} --jinja{date}
curl http://127.0.0.1:8080/v1/chat/completions -H "Content-Type: application/json" \\
  -d {shlex.quote(json.dumps(request))}
```

With Ollama. Its API has no `logit_bias`: there the model calls as often as it does without one.
Its templates are its own: compare `ollama show --template {name}` with the chat template.

```sh
cat > Modelfile <<'END'
{LINE.join(settings)}
END
ollama create {name} -f Modelfile
ollama run {name} "..."
```

## What was measured

Of the model as it was trained, not of this file ({kind}).

{_measured(run)}
"""


def _bias(run: Run, folder: pathlib.Path) -> float | None:
    """Returns the calibrated bias on the decision token, where the folder has one for it."""
    if run.text.decision_id is None or not (folder / collab_config.NAME).is_file():
        return None
    calibration = collab_config.read(folder)
    of_token = calibration["decision_token"]  # None where `calibrate` was not told
    same = of_token in (None, run.text.special.decision_token)
    return calibration["bias"] if same else None


def _about_bias(run: Run, bias: float | None, kind: str) -> str:
    """Returns what is known of the bias, and how a call looks in a response."""
    token = run.text.special.decision_token
    if not token:
        return ""
    shown = f"A response shows it as `{token}`."
    if not run.text.marker.startswith(token):
        shown = f"A response shows it as `{token}`, which stands for the marker."
    if bias is None:
        return (
            f"{shown} `python -m collab_jax.calibrate` finds the bias for a budget: with the\n"
            "collab_config.json that it writes beside this file, another export has it here."
        )
    return (
        f"{shown} The bias {bias} is that of collab_config.json. Rounding to {kind} moves\n"
        "margins: unless it was found by this file's own records, check the share of calls."
    )


def _head(run: Run, step: int, library: str) -> str:
    """Returns how a model card begins: metadata for the hub, and what the model is."""
    config = run.config
    base, _ = hf.split_revision(config.model.path)
    trained = f"budget {config.budget:g}, {step} steps, seed {config.seed}"
    if not step:
        trained = f"the adapter {config.lora.start} as it was given"
    return f"""---
base_model: {base}
library_name: {library}
pipeline_tag: text-generation
tags: [collab_jax, device-cloud, routing]
---

# {pathlib.Path(base).name}, which knows when to ask the cloud

Post-trained by collab_jax ({config.task.name}, {trained}) to answer what it can and to
end with `{run.text.marker}` where a larger model should answer instead.

## How to call it
"""


def _prompting(run: Run) -> str:
    """Returns how the model is prompted, and what a response is."""
    return (
        f"Prompt it by its chat template with {json.dumps(run.config.task.prompt)}"
        f"{_system(run.config)}. A response is `<think> ... </think><answer> ... </answer>`, or it "
        "ends with the\nmarker: then send the question to the cloud."
    )


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
