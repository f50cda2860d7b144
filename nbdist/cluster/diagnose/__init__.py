"""Diagnosis: stacks of all ranks, hang detection, and a debugger on a failed rank."""
