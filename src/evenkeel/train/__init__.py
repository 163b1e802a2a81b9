"""Training the reference networks."""

from evenkeel.train.loop import fit as fit
