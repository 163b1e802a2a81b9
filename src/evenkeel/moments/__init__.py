"""Means and variances of activations, taken in one read and combined exactly."""

from evenkeel.moments.batch import BatchMoments as BatchMoments
