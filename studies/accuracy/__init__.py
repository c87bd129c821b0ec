"""The accuracy study: its cells in order of worth, their runs and records, and what these say."""
