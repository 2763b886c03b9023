"""# SVAMP on SmolLM2-135M: every way to train, from one warm start

The cloud is simulated: wrong on 6 % of the problems, more often on hard ones. SmolLM2-135M-Instruct
with an adapter of rank 8, 60 steps of 32 prompts x 4 responses; budget 30 %; evaluated on SVAMP's
1,000 test problems. All start from one warm start, the adapter that `./launch/real.sh runs/svamp`
makes first.

- `ours`: the config's own settings: the paper's gradient without its filter, averaged weights.
- `gapg`: the paper's method, with its filter. `grpo`: the paper's Collaboration-Aware Tuning.
  `task-tuning`: GRPO that is never rewarded for a call; the routers that the paper compares with
  route this model.
"""

from collab_jax.rl.sweeps import Cell, Sweep

THREE, ONE = range(3), range(1)
LAST = {"optim.average": 0.0}  # the last weights count, not averaged ones
ROUTED = {"eval.fit_prompts": 512, "routers.record": ("hidden",)}


def get_sweep() -> Sweep:
    return Sweep(
        "configs/svamp_smollm2.py",
        {"lora.start": "runs/svamp/start"},
        {
            "ours": Cell(ROUTED, THREE),
            "task-tuning": Cell(
                LAST | {"algorithm.reward": "task", "algorithm.advantage": "grpo"} | ROUTED,
                THREE,
            ),
            "grpo": Cell(LAST | {"algorithm.advantage": "grpo"}, ONE),
            "gapg": Cell(LAST | {"algorithm.filter": "d1d2"}, ONE),
        },
        prompts=False,
    )
