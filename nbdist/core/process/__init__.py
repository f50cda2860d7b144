"""Settings of this process: memory allocator, garbage collection, random number generators, threads, lazy imports."""
