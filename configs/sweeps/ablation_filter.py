"""# Ablation: the prompt filter

GAPG on Countdown-tiny at a budget of 10 %, where the filter drops most: the paper's filter (`d1d2`:
D1 is every prompt that some response solves), one whose D1 holds the prompts with right and wrong
responses (`mixed`), one that drops only prompts without a gradient (`zero-variance`), and none.
"""

from collab_jax.rl.sweeps import Cell, Sweep


def get_sweep() -> Sweep:
    kinds = {"d1d2": "d1d2", "mixed": "mixed", "zero-variance": "zero_variance", "none": "none"}
    cells = {name: Cell({"algorithm.filter": kind}, range(2)) for name, kind in kinds.items()}
    return Sweep("configs/countdown_tiny.py", {"budget": 0.1}, cells)
