"""The benchmark: its grid, its rows, its baselines, its tables, its planner."""
