r"""Numbers, word problems and code in one run: a mix on SmolLM2-135M-Instruct, budget 30 %.

    python -m collab_jax.sft --config configs/mixed_smollm2.py --workdir runs/mixed/start
    python -m collab_jax.train --config configs/mixed_smollm2.py \
        --workdir runs/mixed/run --config.lora.start=runs/mixed/start
    python -m collab_jax.evaluate --split test --config configs/mixed_smollm2.py \
        --workdir runs/mixed/run --config.lora.start=runs/mixed/start

The settings are those of configs/svamp_smollm2.py, which explains them, but for lengths, which
follow from MBPP, and the cloud's errors, which do not depend on difficulty. Of five training
prompts two are Countdown's, two SVAMP's and one MBPP's. The prompt is the problem and no more,
`23 46 8=31` in Countdown; the warm start teaches what to do with each. MBPP needs bubblewrap
(docs/tasks.md). The report tells the tasks apart. An evaluation has 440 prompts: beyond, MBPP's 90
for validation run out, and the shares would be others. Measured is a run that was cut to half an
hour alone, in which attempts were learnt too (docs/results.md).
"""

import pathlib
import runpy

from ml_collections import ConfigDict

svamp = runpy.run_path(str(pathlib.Path(__file__).with_name("svamp_smollm2.py")))


def get_config() -> ConfigDict:
    config = svamp["get_config"]()
    config.task.name = "mix"
    config.task.mix = (("countdown", 2), ("svamp", 2), ("mbpp", 1))
    config.prompt_length = 256
    config.max_new_tokens = 256
    config.cloud.error_skew = 0.0
    config.eval.prompts = 440
    config.eval.batch_size = 110
    return config
