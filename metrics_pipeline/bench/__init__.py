"""Benchmarks: how fast each path from the topic into the table is, measured on the real parts and checked for correctness."""
