r"""Mathematics on Llama-3.2-1B-Instruct, budget 30 %.

As configs/math_qwen2p5_1p5b.py, whose note holds here too, with another model. The paper trained
this model, but its figures are not known here: the only target is the routers on the same model.

    python -m collab_jax.sft --config configs/math_llama3p2_1b.py --workdir runs/math_llama1b/start
    python -m collab_jax.train --config configs/math_llama3p2_1b.py \
        --workdir runs/math_llama1b/run --config.model.path=runs/math_llama1b/start
    python -m collab_jax.evaluate --split test --config configs/math_llama3p2_1b.py \
        --workdir runs/math_llama1b/run --config.model.path=runs/math_llama1b/start
    python -m collab_jax.evaluate --suite paper --config configs/math_llama3p2_1b.py \
        --workdir runs/math_llama1b/run --config.model.path=runs/math_llama1b/start
    python -m collab_jax.export --config configs/math_llama3p2_1b.py \
        --workdir runs/math_llama1b/run --config.model.path=runs/math_llama1b/start \
        --out runs/math_llama1b/model
    python -m collab_jax.calibrate --records runs/math_llama1b/run/test.parquet --rate 0.3 \
        --delta 0.05 --hold_out 0.5 --decision_token "<|reserved_special_token_0|>" \
        --out runs/math_llama1b/model

`launch/gpu.sh configs/math_llama3p2_1b.py runs/math_llama1b` (or tpu_vm.sh) does all of this but
the suite. The weights are gated: accept their licence on the hub and log in (`hf auth login`, or
HF_TOKEN), or give `--config.model.path=FOLDER` to the first command. Not run yet.

Memory, as `python -m collab_jax.memory --config configs/math_llama3p2_1b.py --devices N --gib SIZE`
plans it: 30.0 GiB, on one GPU of 80 or 140 GB. It does not fit on a v5e-8 (27.8 GiB on each
device); with --config.lora.rank=16 it does.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

qwen = runpy.run_path(str(pathlib.Path(__file__).with_name("math_qwen2p5_1p5b.py")))


def get_config() -> ConfigDict:
    config = qwen["get_config"]()
    config.model.path = "meta-llama/Llama-3.2-1B-Instruct"
    return config
