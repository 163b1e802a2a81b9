"""The claims of noise-aware normalization."""
