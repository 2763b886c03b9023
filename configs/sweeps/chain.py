"""# Chains: every way to train, one thing changed at a time

A model of 0.79 M parameters on arithmetic whose answers cannot be checked by looking at them; 160
steps of 64 prompts x 4 responses at temperature 0.5 with averaged weights for every row, from one
warm start (docs/results/chain/start, by `configs/chain_tiny_sft.py`); budget 30 %. Every row has
the learning rate with which its model does best by itself within the budget, on validation;
`task-tuning`, which never calls, the one with which its log-probability gate does best there. The
cloud is simulated: wrong on 6 % of the problems, more often on long chains. Five seeds of `ours`
at each budget, `gapg`, `grpo` and `task-tuning`, two of the others.

- `ours`: the decision is scored by the verdict on every attempt, and all that is learnt, by the
  call's row of the head. `attempts-too`: the same, and the policy gradient of the attempts moves
  the whole model.
- Calls sampled, as other tokens are: `gapg` (the paper's method: leave-one-out, D1 and D2),
  `gapg-no-filter`, from which `attempts-too` differs by its decision alone, `grpo` (the paper's
  Collaboration-Aware Tuning). Dr. GRPO would be the same as leave-one-out, since gradients have
  unit norm, and DA-GRPO (arXiv 2602.00166) nearly the same as GRPO: its price on calls rises only
  while they exceed the budget, as they do in few steps. `gapg-dual`: as `gapg-no-filter`, with a
  control of what a right call earns that is to bring calls to the budget, from below as well.
- `task-tuning`: never rewarded for a call; the routers that the paper compares with route this
  model.
- `ours` at other budgets, with the learning rate chosen at 30 %: `budget-10` to `budget-50`. How
  often does the model call by itself?

One setting of `ours` at a time: chain_settings.py.
"""

from typing import Any

from collab_jax.rl.search import Search
from collab_jax.rl.sweeps import Cell, Sweep

FIVE, TWO = range(5), range(2)
ROUTERS = ("classifier", "agreement", "hidden", "token_margin", "policy_logprob")
ROUTED = {"eval.fit_prompts": 4096, "routers.record": ROUTERS}
BRISK = {"algorithm.control_rate": 0.05, "algorithm.control_gain": 2.0}  # it has 160 steps
OF_A_ROW = (5e-4, 1e-3, 2e-3)  # learning rates


def sampled(**changes: str) -> dict[str, Any]:
    """Returns changes of the section `algorithm`, by the key of the config; calls are sampled."""
    own = {"decision": "sampled", "advantage": "gapg"} | changes
    return {f"algorithm.{key}": x for key, x in own.items()}


def get_sweep() -> Sweep:
    return Sweep(
        "configs/chain_tiny.py",
        {"eval.split": "test"},
        {
            "ours": Cell(ROUTED, FIVE, values=OF_A_ROW),
            "attempts-too": Cell({"algorithm.advantage": "gapg"}, TWO),
            "gapg": Cell(sampled(filter="d1d2"), FIVE),
            "gapg-no-filter": Cell(sampled(), TWO),
            "grpo": Cell(sampled(advantage="grpo"), FIVE),
            "gapg-dual": Cell(sampled(control="dual_alpha_c") | BRISK, TWO),
            "task-tuning": Cell(
                sampled(advantage="grpo", reward="task") | ROUTED, FIVE, router="logprob"
            ),
        }
        | {f"budget-{b}": Cell({"budget": b / 100}, FIVE, like="ours") for b in (10, 20, 40, 50)},
        search=Search("optim.learning_rate", (2.5e-5, 5e-5, 1e-4)),
    )
