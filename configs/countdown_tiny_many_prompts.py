"""Countdown with the embedded model by our recipe: many prompts, small groups, no filter, averaged weights. Budget 30 %.

    python -m collab_jax.train --config configs/countdown_tiny_many_prompts.py --workdir runs/many_prompts

The paper's reward and gradient on 64 prompts x 4 responses a step, as many responses as 32 x 8. Why it works: what limits a
short run here is how many different prompts have taught it something. Training sharpens (the sampled answers get better,
while the share of prompts that some response solves stays where it was), and a group of eight mostly tells four times the
same. In single runs of seed 0 twice the prompts gained a point or more of accuracy on the device, with this reward and with
the task's alone; with two responses a group the gain was gone. A larger batch of prompts also needs no filter: in it enough
prompts are solved, and those that only the cloud solves are what the call is learnt from. The averaged weights take out the
noise that the last steps leave: 0.2 to 0.7 points on the device in those runs.

Results: launch/results/paper_table, cell `many-prompts`; configs/sweeps/ablation_group.py is to measure the above on more seeds.
"""

import pathlib
import runpy

common = runpy.run_path(str(pathlib.Path(__file__).with_name("common.py")))


def get_config():
    config = common["get_config"]()
    config.budget = 0.3
    config.prompts_per_step = 64
    config.group = 4
    config.algorithm.filter = "none"
    config.optim.average = 0.95
    return config
