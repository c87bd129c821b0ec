"""Tokens a second and losses of training, beside stock transformers under its own Trainer."""
