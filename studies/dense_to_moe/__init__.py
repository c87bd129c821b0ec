"""A conventional MoE checkpoint that knows a language, made from a dense model that does."""
