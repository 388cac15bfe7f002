"""Warmup-stable-decay: MiniCPM, arXiv:2404.06395, eq. 1; 1-sqrt: arXiv:2405.18392, eq. 1."""

import math


def wsd(t, *, peak, warmup, stable, decay_steps, init=0.0, end=0.0, decay="one_minus_sqrt"):
    if t < warmup:
        return init + (peak - init) * t / warmup
    if t < warmup + stable:
        return peak
    tau = (t - warmup - stable) / decay_steps if decay_steps else 1.0
    if tau >= 1:
        return end
    return {
        "linear": lambda: peak - (peak - end) * tau,
        "cosine": lambda: end + (peak - end) * (1 + math.cos(math.pi * tau)) / 2,
        "one_minus_sqrt": lambda: end + (peak - end) * (1 - math.sqrt(tau)),
        "exponential": lambda: peak * (end / peak) ** tau,
        "inverse_proportional": lambda: 1 / ((1 - tau) / peak + tau / end),
    }[decay]()
