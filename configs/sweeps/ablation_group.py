"""# Ablation: many prompts or large groups

Our recipe (`configs/countdown_tiny_ours.py`) with the same 256 responses a step, divided otherwise
into prompts x responses; and with 64 x 4, but without the averaged weights (`last-weights`).
"""

from typing import Any

from collab_jax.rl.sweeps import Cell, Sweep


def get_sweep() -> Sweep:
    cells: dict[str, dict[str, Any]] = {
        f"{256 // group}x{group}": {"prompts_per_step": 256 // group, "group": group}
        for group in (4, 8, 16, 2)
    }
    cells["last-weights"] = {"optim.average": 0.0}
    two = {name: Cell(changes, range(2)) for name, changes in cells.items()}
    return Sweep("configs/countdown_tiny_ours.py", {}, two)
