"""What perceiver-core costs, measured: `python -m benchmarks`, or `make bench`.

A benchmark first checks that what it compares agrees, then times it in turns, so that a busy machine slows
all alike, and reports medians. README.md beside this file says what each figure means.
"""
