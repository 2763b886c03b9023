"""# Countdown: every way to train, one thing changed at a time

The embedded model of 0.79 M parameters on problems whose answers can be checked, by whoever looks:
an attempt ends with what it reached, and that is the target or it is not. 160 steps of 64 prompts x
4 responses at temperature 0.5 with averaged weights for every row, from one warm start
(`configs/countdown_tiny_sft.py`); budget 30 %. Every row has the learning rate with which its model
does best by itself within the budget, on validation; `task-tuning`, which never calls, the one with
which its log-probability gate does best there. The cloud is simulated: wrong on 5.5 % of the
problems, more often on those with four numbers. Five seeds of `ours` at each budget, `gapg`, `grpo`
and `task-tuning`, two of the others.

- `ours`: the decision is scored by the verdict on every attempt, and the policy gradient of the
  attempts moves the whole model. `decision-alone`: attempts teach nothing, the call's row of the
  head is all that moves, as on chains.
- Calls sampled, as other tokens are: `gapg` (the paper's method: leave-one-out, D1 and D2),
  `gapg-no-filter`, from which `ours` differs by its decision alone, `grpo` (the paper's
  Collaboration-Aware Tuning). `gapg-dual`: as `gapg-no-filter`, with a control of what a right call
  earns that is to bring calls to the budget, from below as well. `da-grpo` (arXiv 2602.00166): as
  `grpo`, with a price on calls that rises while they exceed the budget.
- `task-tuning`: as `gapg-no-filter`, and never rewarded for a call; the routers that the paper
  compares with route this model.
- `ours` at other budgets, with the learning rate chosen at 30 %: `budget-10` to `budget-50`. How
  often does the model call by itself?

Which answers are wrong a reader can see here (*last result leads nowhere* is a router of the
table that does no more). On chains (chain.py) nothing shows.
"""

import pathlib
import runpy

from collab_jax.rl.search import Search
from collab_jax.rl.sweeps import Cell, Sweep

chain = runpy.run_path(str(pathlib.Path(__file__).with_name("chain.py")))
FIVE, TWO, BRISK = chain["FIVE"], chain["TWO"], chain["BRISK"]
ROUTED, OF_A_ROW, sampled = chain["ROUTED"], chain["OF_A_ROW"], chain["sampled"]


def get_sweep() -> Sweep:
    return Sweep(
        "configs/countdown_tiny_ours.py",
        # A rate at which a model collapses is a rate that was tried: its run goes on to the end.
        {"eval.split": "test", "train.empty_d1_limit": 160},
        {
            "ours": Cell(ROUTED, FIVE),
            "decision-alone": Cell({"algorithm.advantage": "none"}, TWO, values=OF_A_ROW),
            "gapg": Cell(sampled(filter="d1d2"), FIVE),
            "gapg-no-filter": Cell(sampled(), TWO),
            "grpo": Cell(sampled(advantage="grpo"), FIVE),
            "gapg-dual": Cell(sampled(control="dual_alpha_c") | BRISK, TWO),
            "da-grpo": Cell(sampled(advantage="grpo", control="lagrangian") | BRISK, TWO),
            "task-tuning": Cell(sampled(reward="task") | ROUTED, FIVE, router="logprob"),
        }
        | {f"budget-{b}": Cell({"budget": b / 100}, FIVE, like="ours") for b in (10, 20, 40, 50)},
        search=Search("optim.learning_rate", (5e-5, 1e-4, 2e-4)),
    )
