"""NumPy float64 references, one per paper, written from the papers' equations.

A function runs a whole trajectory and returns the parameters after every step. Most papers treat
each leaf by itself: those functions take one leaf, `p` and its gradients `gs`, with the rate of
each step in `lrs`. The two that look at the whole tree take dictionaries of leaves.
"""
