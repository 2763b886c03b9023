"""What the tests of Countdown's streams share: a config, the first of a stream, a share's bound."""

import itertools
import runpy

from conftest import ROOT

CONFIG = ROOT / "configs" / "countdown_tiny_sft.py"


def tiny_config(**changes):
    """The embedded model's config, with changes to its `task` part."""
    config = runpy.run_path(str(CONFIG))["get_config"]()
    config.task.update(changes)
    return config


def take(n, source):
    return list(itertools.islice(source, n))


def within(count, n, share):
    """True where `count` of `n` lies within 4.5 standard deviations of the share."""
    return abs(count - n * share) <= 4.5 * (n * share * (1 - share)) ** 0.5
