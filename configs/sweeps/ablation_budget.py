"""# Ablation: the budget in training

GAPG on Countdown-tiny with budgets from 10 to 50 %. In training the budget sets one thing: how many
of the prompts that only the cloud solves the filter keeps for each one that the device solves.
Every model is then measured at every call rate.
"""

from collab_jax.rl.sweeps import Cell, Sweep


def get_sweep() -> Sweep:
    budgets = (0.3, 0.1, 0.2, 0.4, 0.5)
    return Sweep(
        "configs/countdown_tiny.py",
        {},
        {f"budget-{b:g}": Cell({"budget": b}, range(2)) for b in budgets},
    )
