"""Data loading: the forms of data, and which samples each rank reads."""
