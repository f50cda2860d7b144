"""Launching processes: engines, their fork server, and the anchor that outlives a kernel."""
