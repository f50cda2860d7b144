"""What runs in an engine's process, beside core."""
