"""What moves an expert from its store into a slot."""
