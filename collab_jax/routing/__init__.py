"""Ways to decide which prompts go to the cloud, one file each, and what they are worth and cost.

The bias that holds a budget is here, too. It imports `rl` and what `rl` may import; `reports` and
the commands import it.
"""
