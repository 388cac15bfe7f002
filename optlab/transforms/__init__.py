"""Primitives: one role a file, each an `optax.GradientTransformation` that works alone."""
