"""# Chains: one setting of `ours` at a time, and controls of the share of calls

As configs/sweeps/chain.py, whose words these are; two seeds of each.

- `temperature-1`, `32x8` (prompts x responses; 64 x 4 elsewhere), `last-weights` (none averaged).
- `grpo-filter`: GRPO's advantage with the paper's filter; calls are sampled.
- With a control of the share of calls, sampled, without a filter: `gapg-dual` moves what a right
  call earns, `da-grpo` (arXiv 2602.00166) puts a price on calls.
"""

import pathlib
import runpy

from collab_jax.rl.sweeps import Cell, Sweep

chain = runpy.run_path(str(pathlib.Path(__file__).with_name("chain.py")))
TWO, OF_A_ROW, sampled = chain["TWO"], chain["OF_A_ROW"], chain["sampled"]


def get_sweep() -> Sweep:
    return chain["get_sweep"]()._replace(
        cells={
            "ours": Cell({}, TWO, values=OF_A_ROW),
            "temperature-1": Cell({"temperature": 1.0}, TWO, values=OF_A_ROW),
            "32x8": Cell({"prompts_per_step": 32, "group": 8}, TWO, values=OF_A_ROW),
            "last-weights": Cell({"optim.average": 0.0}, TWO, values=OF_A_ROW),
            "grpo-filter": Cell(sampled(advantage="grpo", filter="d1d2"), TWO),
            "gapg-dual": Cell(sampled(control="dual_alpha_c"), TWO),
            "da-grpo": Cell(sampled(advantage="grpo", control="lagrangian"), TWO),
        }
    )
