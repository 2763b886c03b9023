"""# Chains: one setting of `ours` at a time

As configs/sweeps/chain.py; two seeds of each. `temperature-1`, `32x8` (prompts x responses; 64 x 4
elsewhere), `last-weights` (none averaged).
"""

import pathlib
import runpy

from collab_jax.rl.sweeps import Cell, Sweep

chain = runpy.run_path(str(pathlib.Path(__file__).with_name("chain.py")))
TWO, OF_A_ROW = chain["TWO"], chain["OF_A_ROW"]


def get_sweep() -> Sweep:
    return chain["get_sweep"]()._replace(
        cells={
            "ours": Cell({}, TWO, values=OF_A_ROW),
            "temperature-1": Cell({"temperature": 1.0}, TWO, values=OF_A_ROW),
            "32x8": Cell({"prompts_per_step": 32, "group": 8}, TWO, values=OF_A_ROW),
            "last-weights": Cell({"optim.average": 0.0}, TWO, values=OF_A_ROW),
        }
    )
