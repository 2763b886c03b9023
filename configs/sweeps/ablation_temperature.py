"""# Ablation: the temperature of the rollouts

Our recipe (`configs/countdown_tiny_ours.py`) with rollouts at temperatures from 1 to 0.3, and what
temperature 0.5 does for the methods that the recipe is compared with: GAPG, GRPO and task tuning,
with the paper's 32 prompts x 8 responses, their filters, and the last weights. In every cell the
gradient is that of the policy that samples, softmax(logits / temperature), and evaluation is
greedy.
"""

from typing import Any

from collab_jax.rl.sweeps import Cell, Sweep

PAPER = {"prompts_per_step": 32, "group": 8, "optim.average": 0.0}


def get_sweep() -> Sweep:
    cells: dict[str, dict[str, Any]] = {
        f"ours-{t:g}": {"temperature": t} for t in (0.5, 0.3, 0.7, 1.0)
    }
    cells["gapg-0.5"] = PAPER | {"algorithm.filter": "d1d2"}
    cells["grpo-0.5"] = PAPER | {"algorithm.advantage": "grpo"}
    cells["task-tuning-0.5"] = PAPER | {"algorithm.advantage": "grpo", "algorithm.reward": "task"}
    two = {name: Cell(changes, range(2)) for name, changes in cells.items()}
    return Sweep("configs/countdown_tiny_ours.py", {}, two)
