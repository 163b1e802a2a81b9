"""Batch-channel normalization, and what it is to mend."""
