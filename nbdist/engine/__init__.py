"""What runs in an engine's process around core: remote calls, status, failures, stack dumps."""
