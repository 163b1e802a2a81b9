"""Segmentation and detection on chips."""
