"""Optimizers, learning-rate schedulers and loss scaling; sharding and gathering of their state."""
