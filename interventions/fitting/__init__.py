"""Fitting interventions to examples: pure functions of arrays and of measurements, no server in sight."""
