"""Settings of this process: memory, random number generators, threads, imports."""
