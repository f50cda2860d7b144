"""How the kernel and engines exchange values and states: shared memory on one host, messages across hosts."""
