r"""Python problems (MBPP) on SmolLM2-135M-Instruct: what a warm start makes of it, on two cores.

    python -m collab_jax.evaluate --split test --config configs/mbpp_smollm2.py \
        --workdir runs/mbpp/before
    python -m collab_jax.sft --config configs/mbpp_smollm2.py --workdir runs/mbpp/start
    python -m collab_jax.evaluate --split test --config configs/mbpp_smollm2.py \
        --workdir runs/mbpp/after --config.lora.start=runs/mbpp/start

The settings are those of configs/svamp_smollm2.py, which explains them, but for these. The data are
mbpp.jsonl (or .gz) in `config.task.data_dir`: 371 problems for training, 90 for validation, 500 for
the test, of which an evaluation takes the first 200 in the order of their hashes. Code is run by
bubblewrap (docs/tasks.md).

Lengths follow from SmolLM2's tokens: 128 hold 95 % of the prompts, which show one test, and 85 % of
the reference solutions in the format (mean 89); longer ones are left out. What the model wrote
before the warm start has no tags: compare the accuracies "tags or not". The warm start is two
tunings of 50 updates, each on half of the problems, the labelling of the other half, and 130
updates: 230 updates of 8 demonstrations. This model solves few of the problems, and each right
response makes room for four that end with the call. Not measured yet.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

svamp = runpy.run_path(str(pathlib.Path(__file__).with_name("svamp_smollm2.py")))


def get_config() -> ConfigDict:
    config = svamp["get_config"]()
    config.task.name = "mbpp"
    config.task.system = "Write Python code."
    config.prompt_length = 128
    config.max_new_tokens = 128
    config.eval.prompts = 200
    config.eval.batch_size = 100

    config.sft.relabel_steps = 50
    config.sft.marker_share = 0.8
    config.sft.steps = 130
    config.sft.batch_size = 8
    config.sft.check_prompts = 64
    return config
