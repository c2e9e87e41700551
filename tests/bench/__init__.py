"""Benchmarks: speed and memory, beside what a user would pick instead; never part of the suite."""
