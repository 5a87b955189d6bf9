"""What any set of runs came to: one HTML page and a Markdown table. ``python -m r2d2fast.report``."""
