"""Losses and telemetry of the recursion."""
