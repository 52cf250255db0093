"""The page that a run leaves: what it shows (page.py), and its drawings (charts.py)."""
