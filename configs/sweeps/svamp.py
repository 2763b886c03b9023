"""# SVAMP on SmolLM2-135M: every way to train, from one warm start

The cloud is simulated: wrong on 6 % of the problems, more often on hard ones. SmolLM2-135M-Instruct
with an adapter of rank 8, 60 steps of 32 prompts x 4 responses; budget 30 %; evaluated on SVAMP's
1,000 test problems. All start from one warm start, the adapter in docs/results/svamp/warm_start,
which the first stage of launch/real.sh makes.

- `ours`: the config's own settings: no filter, rollouts at temperature 0.5, averaged weights.
- `gapg`: the paper's method, with its filter, at temperature 1. `grpo`: the paper's
  Collaboration-Aware Tuning. `task-tuning`: GRPO that is never rewarded for a call; the routers
  that the paper compares with route this model.
"""

from collab_jax.rl.sweeps import Cell, Sweep

THREE, ONE = range(3), range(1)
AS_PUBLISHED = {"temperature": 1.0, "optim.average": 0.0}
ROUTED = {"eval.fit_prompts": 512, "routers.record": ("hidden",)}


def get_sweep() -> Sweep:
    return Sweep(
        "configs/svamp_smollm2.py",
        {"lora.start": "docs/results/svamp/warm_start"},
        {
            "ours": Cell(ROUTED, THREE),
            "task-tuning": Cell(
                AS_PUBLISHED | {"algorithm.reward": "task", "algorithm.advantage": "grpo"} | ROUTED,
                THREE,
            ),
            "grpo": Cell(AS_PUBLISHED | {"algorithm.advantage": "grpo"}, ONE),
            "gapg": Cell(AS_PUBLISHED | {"algorithm.filter": "d1d2"}, ONE),
        },
        prompts=False,
    )
