"""Optimizers, learning-rate schedulers and loss scaling, and how their state is cut and sent."""
