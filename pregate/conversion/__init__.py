"""Gates moved ahead, copied or fitted: a conventional checkpoint in, a pre-gated one out."""
