r"""Mathematics on Qwen2.5-1.5B-Instruct, budget 30 %.

The paper's task: MATH-lighteval, 7.5K training and 5K test problems. Target, read from secondary
notes and not from the paper: at 30 % calls 80.4 % on average over its five maths benchmarks (task
tuning alone 56.1, naive offloading 67.2, collaboration-aware tuning 61.5, a router 70.9, the cloud
93.8).

    python -m collab_jax.sft --config configs/math_qwen2p5_1p5b.py --workdir runs/math_qwen/start
    python -m collab_jax.train --config configs/math_qwen2p5_1p5b.py \
        --workdir runs/math_qwen/run --config.model.path=runs/math_qwen/start
    python -m collab_jax.evaluate --split test --config configs/math_qwen2p5_1p5b.py \
        --workdir runs/math_qwen/run --config.model.path=runs/math_qwen/start
    python -m collab_jax.evaluate --suite paper --config configs/math_qwen2p5_1p5b.py \
        --workdir runs/math_qwen/run --config.model.path=runs/math_qwen/start
    python -m collab_jax.export --config configs/math_qwen2p5_1p5b.py \
        --workdir runs/math_qwen/run --config.model.path=runs/math_qwen/start \
        --out runs/math_qwen/model
    python -m collab_jax.calibrate --records runs/math_qwen/run/test.parquet --rate 0.3 \
        --delta 0.05 --hold_out 0.5 --decision_token "<|quad_start|>" \
        --out runs/math_qwen/model

`launch/gpu.sh configs/math_qwen2p5_1p5b.py runs/math_qwen` (or tpu_vm.sh) does all of this but
the suite, and installs and resumes too. The first command fetches the weights from the hub;
math_train.jsonl and math_test.jsonl (or .gz) are read from `data`, or, where they are not there,
MATH is downloaded and built there. The cloud is simulated from the right answers until you name
yours (docs/cloud.md).

From the paper, as far as it is known here: model, data, budget; G = 8, 32 prompts a step, learning
rate 5e-6 and the rewards are those of its Countdown run. Ours: prompt, lengths, number of steps,
the warm start, the call as one unused token of the vocabulary. The warm start needs no data written
by people: it takes the model's own right answers, and calls where it has none (`sft.source`). Its
sft.json says, before any training is paid for, whether calls occur. Not run yet.

Memory, as `python -m collab_jax.memory --config configs/math_qwen2p5_1p5b.py --devices N --gib
SIZE` plans it: 34.4 GiB, on one GPU of 80 or 140 GB. It does not fit on a v5e-8 (33.5 GiB on each
device, as each holds everything but the other devices' share of the batch); with
--config.lora.rank=16 it does.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

common = runpy.run_path(str(pathlib.Path(__file__).with_name("common.py")))


def get_config() -> ConfigDict:
    config = common["get_config"]()
    config.budget = 0.3
    config.prompt_length = 384
    config.max_new_tokens = 1024

    config.model.path = "Qwen/Qwen2.5-1.5B-Instruct"
    config.model.dtype = "bfloat16"

    config.decode.cache_dtype = "bfloat16"

    config.task.name = "math"
    config.task.data_dir = "data"
    config.task.prompt = (
        "{problem}\n\nReason step by step inside <think> </think>, then give the final answer "
        "alone inside <answer> </answer>. If you cannot solve it, end with <unknown> I need "
        "external assistance </unknown> instead of an answer."
    )

    config.optim.learning_rate = 5e-6
    config.train.steps = 400
    config.train.micro_rows = 4
    config.train.remat = True
    config.train.checkpoint_every = 50
    config.eval.prompts = 1000
    config.eval.batch_size = 128

    config.sft.source = "self"
    config.sft.prompts = 1024
    config.sft.check_prompts = 128
    config.sft.steps = 100
    config.sft.batch_size = 32
    config.sft.micro_rows = 1
    config.sft.learning_rate = 1e-5
    config.sft.warmup_steps = 10
    return config
