"""Benchmarks: ``python -m bench`` prints the table, ``pytest bench --benchmark-only`` runs the suites."""
