"""# Ablation: the prompt filter

GAPG on Countdown-tiny at a budget of 10 %, where the filter drops most: the paper's (`d1d2`: D1 is
every prompt that some response solves), with a D1 of prompts that have right and wrong responses
(`mixed`), only what has no gradient dropped (`zero-variance`), and none.
"""

from collab_jax.rl.sweeps import Cell, Sweep


def get_sweep():
    kinds = {"d1d2": "d1d2", "mixed": "mixed", "zero-variance": "zero_variance", "none": "none"}
    cells = {name: Cell({"algorithm.filter": kind}, range(2)) for name, kind in kinds.items()}
    return Sweep("configs/countdown_tiny.py", {"budget": 0.1}, cells)
