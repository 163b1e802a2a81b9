"""The high-dimensional memory on a crossbar."""
