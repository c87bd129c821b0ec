"""What an expert is as bytes, and where all of them lie."""
