"""Fully sharded weights: blocks whose parameters are all-gathered while they are needed."""
