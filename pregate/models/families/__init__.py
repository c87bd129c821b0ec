"""The model families, one file each; only `pregate.models.family` imports them."""
