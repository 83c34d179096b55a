"""How fast, how large? What the figures in `docs/` were measured with."""
