"""Ways to decide which prompts go to the cloud, one file each; what they are worth, what they cost,
and the bias that holds a budget. It imports `rl` and what `rl` may import; `reports` and the
commands import it.
"""
