"""Benchmarks of hexad: each prints a table and writes JSON to results/. Run them with scripts/bench."""
