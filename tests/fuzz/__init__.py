"""Random residual programs in random situations."""
