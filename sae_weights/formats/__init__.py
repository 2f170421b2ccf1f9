"""Checkpoint formats: one file per format, each returning the canonical SAE."""
