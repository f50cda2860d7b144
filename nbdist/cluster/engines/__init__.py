"""The engines: processes with ranks that form a process group."""
