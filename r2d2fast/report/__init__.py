"""A report on any set of runs, as one HTML page and a Markdown table: ``python -m r2d2fast.report``."""
