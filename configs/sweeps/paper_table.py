"""# Countdown-tiny: every way to train, from one start

The embedded model of 0.79 M parameters, 160 steps of 256 responses, the same held-out prompts and
the same cloud for all; budget 30 %. Five seeds of the four methods that the headline compares, two
of the others.

- `ours`: our recipe (`configs/countdown_tiny_ours.py`): 64 prompts x 4 responses at temperature
  0.5, no filter, averaged weights. `many-prompts` is the same at temperature 1.
- `gapg`: the paper's method, group-level policy gradient. `grpo`, `dr-grpo`: the paper's
  Collaboration-Aware Tuning. `task-tuning`: GRPO that is never rewarded for a call; the routers
  that the paper compares with route this model.
- `gapg-no-filter`, `da-grpo` (arXiv 2602.00166), `dual-alpha-c`: other ways to hold the budget.
"""

from collab_jax.rl.sweeps import Cell, Sweep

FIVE, TWO = range(5), range(2)
ROUTED = {"eval.fit_prompts": 4096, "routers.record": ("classifier", "agreement", "hidden")}
MANY = {"prompts_per_step": 64, "group": 4, "algorithm.filter": "none", "optim.average": 0.95}


def algorithm(**changes: str) -> dict[str, str]:
    """Returns changes of the section `algorithm`, by the key of the config."""
    return {f"algorithm.{key}": value for key, value in changes.items()}


def get_sweep() -> Sweep:
    return Sweep(
        "configs/countdown_tiny.py",
        {"budget": 0.3, "eval.split": "test"},
        {
            "ours": Cell({"temperature": 0.5} | MANY | ROUTED, FIVE),
            "gapg": Cell({}, FIVE),
            "grpo": Cell(algorithm(advantage="grpo", filter="none"), FIVE),
            "task-tuning": Cell(
                algorithm(reward="task", advantage="grpo", filter="none") | ROUTED, FIVE
            ),
            "many-prompts": Cell(MANY | ROUTED, TWO),
            "dr-grpo": Cell(algorithm(advantage="dr_grpo", filter="none"), TWO),
            "gapg-no-filter": Cell(algorithm(filter="none"), TWO),
            "da-grpo": Cell(algorithm(advantage="grpo", filter="none", control="lagrangian"), TWO),
            "dual-alpha-c": Cell(algorithm(filter="none", control="dual_alpha_c"), TWO),
        },
    )
