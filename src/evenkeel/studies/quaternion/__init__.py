"""Quaternion layers: colour that was never seen."""
