"""# SVAMP on SmolLM2-135M: every way to train, from one warm start

The cloud is simulated: wrong on 6 % of the problems, more often on hard ones. SmolLM2-135M-Instruct
with an adapter of rank 8, 24 steps of 32 prompts x 4 responses; budget 30 %; evaluated on SVAMP's
1,000 test problems. All start from one warm start, the adapter in docs/results/svamp/start, and
have the same batches, temperature, averaged weights and learning rate: of 1e-4 and 3e-4 the one
that ranked better at 30 % of calls on validation, both for `ours` and for `task-tuning`
(docs/results/svamp.md).

- `ours`: the config's own settings. Decisions are scored; in all other rows calls are sampled.
- `task-tuning`: never rewarded for a call; the routers that the paper compares with route this
  model.
- `gapg`: the paper's method, with its filter. `grpo`: GRPO's advantage without a filter, the
  paper's Collaboration-Aware Tuning. `moved`: the paper's gradient without a filter, with a control
  of what a right call earns that keeps calls about the budget.
"""

from collab_jax.rl.sweeps import Cell, Sweep

THREE, ONE = range(3), range(1)
SAMPLED = {"algorithm.decision": "sampled"}
MOVED = {
    "algorithm.control": "dual_alpha_c",
    "algorithm.control_rate": 0.05,
    "algorithm.control_gain": 2.0,
    "reward.alpha_c": 1.15,  # to begin with
}


def get_sweep() -> Sweep:
    return Sweep(
        "configs/svamp_smollm2.py",
        {
            "lora.start": "docs/results/svamp/start",
            "eval.split": "test",
            "eval.fit_prompts": 512,
            "routers.record": ("hidden",),
        },
        {
            "ours": Cell({}, THREE),
            "task-tuning": Cell(SAMPLED | {"algorithm.reward": "task"}, THREE),
            "gapg": Cell(SAMPLED | {"algorithm.filter": "d1d2"}, ONE),
            "grpo": Cell(SAMPLED | {"algorithm.advantage": "grpo"}, ONE),
            "moved": Cell(SAMPLED | MOVED, ONE),
        },
        prompts=False,
    )
