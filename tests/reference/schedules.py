"""Schedules of one step in float64, phase by phase, from the papers' formulas."""

import math


def wsd_s(t, *, peak, warmup, ends, lengths, low, init=0.0):
    """Wen et al., arXiv:2410.05192, with 1/rate linear in the decay."""
    if t < warmup:
        return init + (peak - init) * t / warmup
    for end, length in zip(ends, lengths, strict=True):
        if t < end:
            tau = max(0.0, (t - (end - length)) / length)
            return 1 / ((1 - tau) / peak + tau / low)
    return low


def infinite(t, *, peak, constant, warmup, cooldown, stay, anneal, end, shape, init=0.0, a=10.0):
    """Ibrahim et al., arXiv:2403.08763: four phases, as durations."""
    if t < warmup:
        return init + (peak - init) * t / warmup
    if t < warmup + cooldown:
        u = (t - warmup) / cooldown
        f = lambda x: 1 / math.sqrt(1 + a * x) - 1  # noqa: E731
        return {
            "cosine": constant + (peak - constant) * (1 + math.cos(math.pi * u)) / 2,
            "inv_sqrt": peak + (constant - peak) * f(u) / f(1),
            "linear": peak + (constant - peak) * u,
        }[shape]
    if anneal is None or t < warmup + cooldown + stay:
        return constant
    if t >= warmup + cooldown + stay + anneal:
        return end
    return constant * (end / constant) ** ((t - warmup - cooldown - stay) / anneal)


def cyclic_cosine(t, *, peak, low, steps, mult, decay, warmup=0, init=0.0):
    """Loshchilov & Hutter, arXiv:1608.03983, eq. 5, cycle after cycle."""
    if t < warmup:
        return init + (peak - init) * t / warmup
    t, cycle, length = t - warmup, 0, steps
    while t >= length:
        t, cycle = t - length, cycle + 1
        length = round(steps * mult**cycle)
    return low + (peak - low) * decay**cycle * (1 + math.cos(math.pi * t / length)) / 2


def damped_cosine(t, *, peak, total, cycles, damping, end, valley, warmup=0, init=0.0):
    """Chinese ModernBERT, arXiv:2510.12285, eq. 1 (at second hand)."""
    if t < warmup:
        return init + (peak - init) * t / warmup
    p = min(1.0, (t - warmup) / (total - warmup))
    crest = peak * (1 - (1 - damping) * p)
    trough = valley * peak * (1 - p) + end * p
    angle = math.pi * (2 * cycles - 1) * p
    return (crest + trough) / 2 + (crest - trough) / 2 * math.cos(angle)


def slanted_triangular(t, *, peak, total, cut_frac, ratio):
    """Howard & Ruder, arXiv:1801.06146, eq. 3."""
    cut = math.floor(total * cut_frac)
    p = t / cut if t < cut else 1 - (t - cut) / (cut * (1 / cut_frac - 1))
    return peak * (1 + max(p, 0) * (ratio - 1)) / ratio


def refined(t, *, values, total, linear):
    """Value t n/T of the table, or between two."""
    x = t * len(values) / total
    i = min(math.floor(x), len(values) - 1)
    following = values[min(i + 1, len(values) - 1)]
    return values[i] + (following - values[i]) * min(x - i, 1) if linear else values[i]
