"""How gradients are summed over ranks."""
