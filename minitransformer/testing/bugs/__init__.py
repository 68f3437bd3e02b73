"""The bug zoo: wrong forwards and backwards that people wrote, to test tests with.

    with bugs.install("dropout_redrawn_in_backward"):
        ...  # a test that passes here is blind to it

The wrong functions are in the files of this folder and nowhere else; nothing of the package imports them.
"""

from minitransformer.testing.bugs import attention, layers, losses, models, training  # noqa: F401  (fill the zoo)
from minitransformer.testing.bugs.bug import Bug, get, install, names
from minitransformer.testing.bugs.score import MutationScore, mutation_score

__all__ = ["Bug", "MutationScore", "get", "install", "mutation_score", "names"]
