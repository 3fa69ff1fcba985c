"""Benchmarks, run from the repository: `python -m bench.throughput`. Not part of the installed package."""
