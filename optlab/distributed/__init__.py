"""Matrices whose parts lie on many devices: plans, schemes, shardings of parameters and state."""
