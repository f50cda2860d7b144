"""Runs: queued, dispatched to engines, monitored to their end."""
