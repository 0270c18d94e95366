"""Studies: the papers' tables and ours. What they share lies in tasks.py, cells.py, work.py and report.py."""
