"""Cells that run on engines, and their replay on a replacement engine."""
