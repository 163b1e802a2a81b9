"""Normalizers of segmentation and detection in batches of one and two."""
