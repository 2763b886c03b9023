"""The paper's method on Countdown, with the embedded model of 0.79 M parameters, on two CPU cores.

    python -m collab_jax.train --config configs/countdown_tiny.py --workdir runs/countdown_tiny

It needs neither a key nor a network, and is no row of the paper: it is the paper's method at the
size of a laptop. Expected after 160 steps (2 minutes 16 seconds in all; seed 0, 4,096 validation
prompts; two cores of an AMD EPYC, 2026-11-28): accuracy on the device 47.1 -> 53.1 %, at 30 % calls
by margin 72.1 -> 79.9 %, natural calls 2.7 -> 5.4 %; the filter drops 17 % of the prompts. Three
prompts in ten have three numbers and the budget is 10 %, so that D2 exceeds its quota.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

common = runpy.run_path(str(pathlib.Path(__file__).with_name("common.py")))


def get_config() -> ConfigDict:
    return common["get_config"]()
