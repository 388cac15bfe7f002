"""Pure functions of arrays: no optax, no pytrees, no mesh."""
