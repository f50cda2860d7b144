"""Cells that run on engines, and what a replacement has to run again."""
