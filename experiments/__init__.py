"""One command per stage: python -m experiments.STAGE."""

import sys

from experiments.shared import signals

if sys.argv[0] == "-m":  # a command, whose imports take seconds
    signals.end_at_once()
