"""What the user supplies: model, data, loss or step, metrics."""
