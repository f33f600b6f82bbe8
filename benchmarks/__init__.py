"""Measurements of perceiver-core's time and memory: `python -m benchmarks`; README.md explains every column."""
