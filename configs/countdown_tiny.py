"""Countdown with the embedded 0.79 M parameter model: the quickstart, on two CPU cores, without a
key or a network.

    python -m collab_jax.train --config configs/countdown_tiny.py --workdir runs/countdown_tiny

No row of the paper: its method at a size for a laptop. Expected after 160 steps (some 4 minutes;
seed 0, 4,096 held-out prompts): accuracy on the device 40.7 -> 52.3 %, at 30 % calls by margin 67.8
-> 79.8 %, the filter drops 24 % of the prompts. Three prompts in ten have three numbers and the
budget is 10 %, so that D2 exceeds its quota.
"""

import pathlib
import runpy

common = runpy.run_path(str(pathlib.Path(__file__).with_name("common.py")))


def get_config():
    return common["get_config"]()
