"""Composable gradient transformations for JAX."""
