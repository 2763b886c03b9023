"""# Serving with another cloud than the one trained with

GAPG on Countdown-tiny, budget 30 %, trained with a cloud that is wrong on 6.2 % of the prompts or
on 30 %. Each model is measured with both, and with a cloud that is never wrong. A worse cloud is
wrong where the better one is and on more prompts, whatever their difficulty. Margins do not depend
on the cloud that serves, so that the model can be used with any; but what a call is worth, and so
when it pays, was learnt with the cloud of training.
"""

from collab_jax.rl.sweeps import Cell, Sweep


def get_sweep() -> Sweep:
    good, poor, perfect = ({"cloud.error_rate": share} for share in (0.062, 0.3, 0.0))
    return Sweep(
        "configs/countdown_tiny.py",
        {"budget": 0.3, "eval.split": "test"},
        {"good-cloud": Cell(good, range(2)), "poor-cloud": Cell(poor, range(2))},
        serve={
            "a good cloud": good,
            "a poor cloud": poor,
            "a perfect cloud": perfect,
        },
    )
