"""# SVAMP on SmolLM2-135M: every way to train, from one warm start

The cloud is simulated: wrong on 6 % of the problems, more often on hard ones. SmolLM2-135M-Instruct
with an adapter of rank 8, 60 steps of 32 prompts x 4 responses; budget 30 %; evaluated on SVAMP's
1,000 test problems. All start from one warm start, the adapter that `./launch/real.sh runs/svamp`
makes first, and have the same batches, temperature, learning rate and averaged weights.

- `ours`: the config's own settings: the paper's gradient, and in the place of its filter a control
  of what a right call earns, which keeps calls about the budget.
- `task-tuning`: the same, never rewarded for a call; the routers that the paper compares with route
  this model.
- `gapg`: the paper's filter in the place of the control. `grpo`: GRPO's advantage, as in the
  paper's Collaboration-Aware Tuning, with the control.
"""

from collab_jax.rl.sweeps import Cell, Sweep

THREE, ONE = range(3), range(1)


def get_sweep() -> Sweep:
    return Sweep(
        "configs/svamp_smollm2.py",
        {
            "lora.start": "runs/svamp/start",
            "eval.split": "test",
            "eval.fit_prompts": 512,
            "routers.record": ("hidden",),
        },
        {
            "ours": Cell({}, THREE),
            "task-tuning": Cell({"algorithm.reward": "task"}, THREE),
            "grpo": Cell({"algorithm.advantage": "grpo"}, ONE),
            "gapg": Cell({"algorithm.filter": "d1d2", "algorithm.control": "none"}, ONE),
        },
        prompts=False,
    )
