"""The comparison of algorithms on Countdown-tiny: every way to train, from one start, on the same held-out prompts.

    python -m collab_jax.sweep --config configs/sweeps/paper_table.py --out runs/paper_table

Budget 30 %. Five seeds for the headline methods, two for the others: 23 runs of some 5 minutes each on two cores. Not run as a
whole yet; seed 0 of gapg and grpo gave 79.2 and 78.2 % overall at 30 % calls by margin.
"""

from collab_jax.sweep import Cell, Sweep

FIVE, TWO = range(5), range(2)


def get_sweep():
    parts = lambda seeds, **changes: Cell({f"algorithm.{key}": value for key, value in changes.items()}, seeds)  # noqa: E731
    return Sweep(
        "configs/countdown_tiny.py",
        {"budget": 0.3, "eval.fit_prompts": 4096},
        {
            "gapg": parts(FIVE),
            "grpo": parts(FIVE, advantage="grpo", filter="none"),
            "task-tuning": parts(FIVE, reward="task", advantage="grpo", filter="none"),
            "dr-grpo": parts(TWO, advantage="dr_grpo", filter="none"),
            "gapg-no-filter": parts(TWO, filter="none"),
            "da-grpo": parts(TWO, advantage="grpo", filter="none", control="lagrangian"),
            "dual-alpha-c": parts(TWO, filter="none", control="dual_alpha_c"),
        },
    )
