"""# Ablation: the reward of a call, and of a well-formed answer

GAPG on Countdown-tiny, budget 30 %, with other weights of the hierarchical reward. The paper's are
alpha_a 2.0 (right on the device), alpha_c 0.5 (called, and the cloud is right) and alpha_f 0.2
(well formed, also where the answer is wrong). A call pays where the device is right with a
probability below (0.938 alpha_c - alpha_f) / alpha_a: 13 % at the paper's weights.
"""

from collab_jax.rl.sweeps import Cell, Sweep


def get_sweep() -> Sweep:
    weights = {
        "paper": {},
        "call-0.3": {"alpha_c": 0.3},
        "call-0.8": {"alpha_c": 0.8},
        "call-1.2": {"alpha_c": 1.2},
        "form-0": {"alpha_f": 0.0},
    }
    cells = {
        name: Cell({f"reward.{key}": x for key, x in changes.items()}, range(2))
        for name, changes in weights.items()
    }
    return Sweep("configs/countdown_tiny.py", {"budget": 0.3}, cells)
