"""# Another cloud than the one trained with

GAPG on Countdown-tiny, budget 30 %, trained with a cloud that is wrong on 6.2 % of the prompts or
on 30 %; each measured with both, and with one that is never wrong. A worse cloud is wrong on the
better one's failures and on others, whatever their difficulty. Margins know no cloud, so serving
needs no other training; what a call is worth, and so when it pays, was learnt.
"""

from collab_jax.rl.sweeps import Cell, Sweep


def get_sweep():
    rate = lambda share: {"cloud.error_rate": share}  # noqa: E731
    return Sweep(
        "configs/countdown_tiny.py",
        {"budget": 0.3},
        {"good-cloud": Cell(rate(0.062), range(2)), "poor-cloud": Cell(rate(0.3), range(2))},
        serve={
            "a good cloud": rate(0.062),
            "a poor cloud": rate(0.3),
            "a perfect cloud": rate(0.0),
        },
    )
