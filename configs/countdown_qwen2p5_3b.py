r"""The paper's Countdown run on Qwen2.5-3B-Instruct, budget 30 % (arXiv 2509.24050).

G = 8, 32 prompts a step, 800 steps, learning rate 5e-6, 256 prompt tokens, 720 response tokens,
rewards 2.0 / 0.5 / 0.2, 5,000 training prompts, 1,000 test prompts.

    python -m collab_jax.sft --config configs/countdown_qwen2p5_3b.py --workdir runs/qwen/start
    python -m collab_jax.train --config configs/countdown_qwen2p5_3b.py \
        --workdir runs/qwen/run --config.model.path=runs/qwen/start
    python -m collab_jax.evaluate --split test --config configs/countdown_qwen2p5_3b.py \
        --workdir runs/qwen/run --config.model.path=runs/qwen/start
    python -m collab_jax.export --config configs/countdown_qwen2p5_3b.py \
        --workdir runs/qwen/run --config.model.path=runs/qwen/start \
        --out runs/qwen/model
    python -m collab_jax.calibrate --records runs/qwen/run/test.parquet --rate 0.3 \
        --delta 0.05 --hold_out 0.5 --decision_token "<|quad_start|>" \
        --out runs/qwen/model

`launch/gpu.sh configs/countdown_qwen2p5_3b.py runs/qwen` (or tpu_vm.sh) does all of this, and
installs and resumes too. Not run yet: it needs accelerators (parameters and Adam's moments in
float32 alone are 37 GB) and the weights from the hub. The call is one token of Qwen2.5's vocabulary
that its text models never use, rendered as the marker. The warm start is ours, not the paper's: it
shows the model its own right answers to 1,024 training prompts, and calls where it has none, until
sampling finds the token and the format; its sft.json says whether it does.

Memory, as `python -m collab_jax.memory --config configs/countdown_qwen2p5_3b.py --devices N --gib
SIZE` plans it: 67.4 GiB, on one GPU of 80 or 140 GB. It does not fit on a v5e-8 (66.6 GiB on each
device, as each holds everything but the other devices' share of the batch); with
--config.lora.rank=16 it does, and with all parameters divided: docs/scale.md.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

common = runpy.run_path(str(pathlib.Path(__file__).with_name("common.py")))


def get_config() -> ConfigDict:
    config = common["get_config"]()
    config.budget = 0.3
    config.prompt_length = 256
    config.max_new_tokens = 720

    config.model.path = "Qwen/Qwen2.5-3B-Instruct"
    config.model.dtype = "bfloat16"

    config.decode.cache_dtype = "bfloat16"

    config.task.prompt = (
        "Using the numbers {numbers}, each exactly once, and the operators + - * / and "
        "parentheses, write an expression that equals {target}. Reason inside <think> </think>, "
        "then give the expression alone inside <answer> </answer>. If you cannot find one, end "
        "with <unknown> I need external assistance </unknown> instead of an answer."
    )
    config.task.train_examples = 5000
    config.task.test_examples = 1000

    config.optim.learning_rate = 5e-6
    config.train.steps = 800
    config.train.micro_rows = 8
    config.train.remat = True
    config.train.checkpoint_every = 50
    config.eval.prompts = 1000
    config.eval.batch_size = 128

    config.sft.source = "self"
    config.sft.prompts = 1024
    config.sft.check_prompts = 128
    config.sft.steps = 100
    config.sft.batch_size = 32
    config.sft.micro_rows = 2
    config.sft.learning_rate = 1e-5
    config.sft.warmup_steps = 10
    return config
