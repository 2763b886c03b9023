"""# SVAMP on SmolLM2-135M: every way to train, from one warm start

The cloud is simulated: wrong on 6 % of the problems, more often on hard ones. SmolLM2-135M-Instruct
with an adapter of rank 8; budget 30 %; evaluated on SVAMP's 1,000 test problems. All start from one
warm start, the adapter in docs/results/svamp/start, with batches of 32 prompts x 4 responses,
temperature 1 and averaged weights. `ours` has the config's settings, chosen of three on validation.
The other rows differentiate the whole model, and a step takes them two to four times as long:
they have 24 steps where `ours` has 96, at a constant learning rate, 1e-4 of 1e-4 and 3e-4 for
`task-tuning` on validation (docs/results/svamp.md).

- `ours`: decisions are scored, and all that is learnt, by the call's row of the head. In all other
  rows calls are sampled.
- `task-tuning`: never rewarded for a call; the routers that the paper compares with route this
  model.
- `gapg`: the paper's method, with its filter. `grpo`: GRPO's advantage without a filter, the
  paper's Collaboration-Aware Tuning.
"""

from collab_jax.rl.sweeps import Cell, Sweep

THREE, ONE = range(3), range(1)
SAMPLED = {
    "algorithm.decision": "sampled",
    "algorithm.advantage": "gapg",
    "optim.learning_rate": 1e-4,
    "optim.decay": False,
    "train.steps": 24,
}
# On prompts that these steps do not use, which `ours` leaves none of. The warm start did use them.
ROUTED = {"eval.fit_prompts": 512, "routers.record": ("hidden",)}


def get_sweep() -> Sweep:
    return Sweep(
        "configs/svamp_smollm2.py",
        {"lora.start": "docs/results/svamp/start", "eval.split": "test"},
        {
            "ours": Cell({}, THREE),
            "task-tuning": Cell(SAMPLED | {"algorithm.reward": "task"} | ROUTED, THREE),
            "gapg": Cell(SAMPLED | {"algorithm.filter": "d1d2"}, ONE),
            "grpo": Cell(SAMPLED | {"algorithm.advantage": "grpo"}, ONE),
        },
        prompts=False,
    )
