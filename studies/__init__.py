"""What only the studies need; not part of the wheel."""
