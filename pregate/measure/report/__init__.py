"""An evaluation for people: what it says, its page `report.html`, its figures, and its summary for the terminal."""
