"""Batch Kalman normalization, measured."""
