"""Fully sharded parameters (as FSDP): blocks whose parameters are all-gathered while they compute."""
