"""What nbdist uses of other packages without their documenting it: one function each, with versions and tests."""
