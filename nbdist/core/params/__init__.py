"""Parameters: a table of where each one's parts lie, and how they are sharded and gathered."""
