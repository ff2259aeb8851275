"""What tests and benchmarks stand on: the upstream simulator, its handle, and a load generator."""
