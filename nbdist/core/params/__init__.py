"""Parameters: one table of where each lies, how it is sharded and gathered."""
