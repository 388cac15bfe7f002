"""Adam in, or by way of, a subspace of the gradient."""
