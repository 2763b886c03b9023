"""Countdown with the embedded 0.79 M parameter model: the quickstart, on two CPU cores, without a key or a network.

python -m collab_jax.train --config configs/countdown_tiny.py --workdir runs/countdown_tiny
"""

import pathlib
import runpy

common = runpy.run_path(str(pathlib.Path(__file__).with_name("common.py")))


def get_config():
    return common["get_config"]()
