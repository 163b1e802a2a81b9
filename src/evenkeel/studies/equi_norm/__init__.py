"""Equi-normalization: balanced networks, how fast, trained, and on analog arrays."""
