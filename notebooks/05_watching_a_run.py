# ---
# jupyter:
#   accelerator: TPU
#   colab:
#     gpuType: V5E1
#     provenance: []
#     toc_visible: true
#   jupytext:
#     formats: ipynb,py:percent
#     notebook_metadata_filter: accelerator,colab,kernelspec
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/$REPOSITORY/blob/main/notebooks/05_watching_a_run.ipynb)
#
# # Watching a run
#
# **What can a run tell about itself that its loss does not?**
#
# That a batch was broken, and which one. How far the learning rate is from the edge at which
# training turns unstable. Whether a larger batch would help. How much a wrong rate would cost. Each
# is a function call, and here each is put to a small network that learns scikit-learn's handwritten
# digits.

# %%
import importlib.util

if importlib.util.find_spec("optlab") is None:
    # From the repository: on the package index the name is somebody else's.
    print("optlab is missing: %pip install of its repository")
    # %pip install -q "optlab[notebooks] @ git+https://github.com/$REPOSITORY"

# %%
import os

import matplotlib.pyplot as plt

SMOKE = os.environ.get("OPTLAB_SMOKE") == "1"  # small sizes, for tests
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK, FAINT = "#1A1A1A", "#8A8A8A"
plt.rcParams.update(
    {
        "figure.dpi": 110,
        "figure.constrained_layout.use": True,
        "font.size": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlelocation": "left",
        "axes.titleweight": "bold",
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "axes.prop_cycle": plt.cycler(color=COLOURS),
        "grid.color": "#E6E6E6",
        "lines.linewidth": 2,
        "legend.frameon": False,
    }
)

# %%
# @title Settings
steps = 600  # @param {type:"integer"}
peak = 5e-4  # @param {type:"number"}
batch_size = 64  # @param {type:"integer"}
width = 64  # @param {type:"integer"}
descent_steps = 2000  # @param {type:"integer"}
descent_rates = [0.8, 0.4]  # @param {type:"raw"}
swept_rates = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1]  # @param {type:"raw"}
if SMOKE:
    steps, width, descent_steps, descent_rates = 120, 32, 400, [0.8]
    swept_rates = swept_rates[2::2]

# %%
import functools
import math
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import optlab
from optlab import diagnostics
from optlab.diagnostics import picture

print("JAX runs on", jax.devices()[0].platform.upper())

digits = load_digits()
order = np.random.default_rng(0).permutation(len(digits.data))
images = digits.data[order].astype(np.float32) / 16
images = jnp.asarray(images - images.mean(0))
labels = jnp.asarray(digits.target[order], jnp.int32)
training, held_out = (images[:1400], labels[:1400]), (images[1400:], labels[1400:])


def init(key):
    def dense(key, m, n):
        return {"kernel": jax.random.normal(key, (m, n)) / m**0.5, "bias": jnp.zeros(n)}

    keys = jax.random.split(key, 3)
    return {
        "first": dense(keys[0], 64, width),
        "second": dense(keys[1], width, width),
        "head": dense(keys[2], width, 10),
    }


def network(params, x):
    for name in ("first", "second"):
        x = jax.nn.gelu(x @ params[name]["kernel"] + params[name]["bias"])
    return x @ params["head"]["kernel"] + params["head"]["bias"]


def loss(params, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(network(params, x), y).mean()


beginning = init(jax.random.key(0))


def batch(step, size):
    chosen = jax.random.randint(jax.random.fold_in(jax.random.key(1), step), (size,), 0, 1400)
    return images[chosen], labels[chosen]


# %% [markdown]
# ## A dashboard, and two broken batches
#
# `watch` measures what goes into an optimizer and what comes out; `metrics` reads it from any
# state, however deep, inside `jax.jit`. Nothing about the step changes.
#
# At one step a third of the way somebody forgot to scale the pixels: they are 255 times too large.
# At two thirds one pixel is not a number. The loss of these batches shows it too late: the weights
# have been changed by then. `skip_bad_steps` looks at the gradient first, and leaves the step out.

# %%
schedule = optlab.warmup_linear_decay(peak, steps // 10, steps)
measures = [optlab.measures.gradient_rms, optlab.measures.relative_update]
unguarded = optlab.watch(optlab.lion(schedule), measures, learning_rate=schedule)
guarded = optlab.watch(
    optlab.skip_bad_steps(optlab.lion(schedule)), measures, learning_rate=schedule
)
unscaled, not_a_number = steps // 3, 2 * steps // 3


@functools.partial(jax.jit, static_argnums=0)
def train(tx):
    def step(run, t):
        params, state = run
        x, y = batch(t, batch_size)
        x = jnp.where(t == unscaled, 255 * x, x)
        x = jnp.where(t == not_a_number, x.at[0, 0].set(jnp.nan), x)
        grads = jax.grad(loss)(params, x, y)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), optlab.metrics(state) | {"loss": loss(params, *training)}

    return jax.lax.scan(step, (beginning, tx.init(beginning)), jnp.arange(steps))[1]


seen, lost = (jax.tree.map(np.asarray, train(tx)) for tx in (guarded, unguarded))
print("metrics:", ", ".join(seen))
print("loss at the end, guarded:", seen["loss"][-1], " unguarded:", lost["loss"][-1])

skips = np.flatnonzero(np.diff(seen["steps_skipped"], prepend=0))
print("steps skipped:", skips)
assert list(skips) == [unscaled, not_a_number]
assert np.isfinite(seen["loss"]).all()
assert not np.isfinite(lost["loss"][not_a_number:]).any()

# %%
figure, axes = plt.subplots(4, 1, figsize=(9, 8), sharex=True, height_ratios=(2, 1, 1, 1))
axes[0].plot(lost["loss"], color=COLOURS[1], label="unguarded")
axes[0].plot(seen["loss"], color=COLOURS[0], label="skip_bad_steps")
axes[0].set(title="loss on all training images", ylim=(0, None))
axes[0].legend(loc="upper right")
axes[1].plot(seen["gradient_rms"], color=COLOURS[2], linewidth=1.2)
axes[1].plot(not_a_number, np.nanmin(seen["gradient_rms"]), "x", color=COLOURS[1], markersize=9)
axes[1].set(title="gradient_rms (a cross: not a number)", yscale="log")
axes[2].plot(seen["relative_update"], color=COLOURS[3])
axes[2].set(title="relative_update", ylim=(0, None))
axes[3].plot(seen["learning_rate"], color=COLOURS[4])
axes[3].set(title="learning_rate", xlabel="step", ylim=(0, None))
for ax in axes:
    for place in (unscaled, not_a_number):
        ax.axvline(place, color=FAINT, linewidth=1, linestyle=":")
plt.show()

# %% [markdown]
# ## The edge of stability
#
# On a quadratic, gradient descent with rate r is stable while the Hessian's largest eigenvalue, the
# sharpness, is below 2 / r. Networks do something odd: the sharpness rises until it meets this
# limit, and then stays there, while the loss goes on falling. `sharpness` finds the eigenvalue by
# Lanczos, from products with the Hessian that cost two gradients each. The matrix itself is never
# made.
#
# Here full-batch gradient descent, with a squared loss. Dashed is 2 / r.

# %%
few = images[:300], labels[:300]


def squared(params, x, y):
    return jnp.mean(jnp.sum((network(params, x) - jax.nn.one_hot(y, 10)) ** 2, -1)) / 2


@jax.jit
def descend(params, rate):
    """Take 20 steps; return the losses before each."""

    def step(params, _):
        value, grads = jax.value_and_grad(squared)(params, *few)
        return jax.tree.map(lambda p, g: p - rate * g, params, grads), value

    return jax.lax.scan(step, params, length=20)


def history(rate):
    """Descend, and look at the sharpness every 20 steps."""
    params, values, sharpness = beginning, [], []
    for _ in range(descent_steps // 20):
        sharpness.append(float(diagnostics.sharpness(squared, params, *few, steps=20)))
        params, losses = descend(params, rate)
        values.extend(np.asarray(losses))
    limit = float(diagnostics.stability_limit(rate))
    found = {"step": 20 * np.arange(len(sharpness)), "loss": values[::20]}
    return found | {"sharpness": sharpness, "limit": limit}, params, values


def show(draw, *what):
    """Show a picture that `optlab.diagnostics` draws: it writes files."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "picture.png"
        draw(*what, path)
        page = plt.imread(path)
    figure, ax = plt.subplots(figsize=(11, 6.6), layout="none")
    figure.subplots_adjust(0, 0, 1, 1)
    ax.imshow(page)
    ax.axis("off")
    plt.show()


runs = {f"rate {rate:g}": history(rate) for rate in descent_rates}
for name, (found, _, values) in runs.items():
    ratio = np.asarray(found["sharpness"]) / found["limit"]
    late, rises = ratio[len(ratio) // 2 :], np.mean(np.diff(values) > 0)
    print(f"{name}: sharpness / limit {ratio[0]:.2f} at first,", end=" ")
    print(f"{late.min():.2f} to {late.max():.2f} in the second half;", end=" ")
    print(f"the loss rose in {rises:.0%} of the steps and ended at {values[-1] / values[0]:.1%}")
    if name == "rate 0.8":
        assert ratio[0] < 1
        assert 0.85 < late.mean() < 1.15
        assert values[-1] < 0.1 * values[0]

show(picture.draw_sharpness, {name: found for name, (found, _, _) in runs.items()})

# %% [markdown]
# ## Where it ended: a point, its spectrum, its trace
#
# Some numbers about the place to which the first run came. `hessian_trace` needs only products with
# random signs, and says how sure it is; the eigenvalues that Lanczos finds at both ends are exact
# to the error printed beside them. Momentum moves the edge: `stability_margin` knows its forms.

# %%
found, point, _ = runs[f"rate {descent_rates[0]:g}"]
count = sum(p.size for p in jax.tree.leaves(point))
spectrum = diagnostics.hessian_spectrum(squared, point, *few)
trace = diagnostics.hessian_trace(squared, point, *few)
top = float(spectrum.values[-1])
assert top == float(diagnostics.sharpness(squared, point, *few))

print(f"{count} parameters")
print("largest eigenvalues ", *(f"{x:8.3f}" for x in spectrum.values[:-6:-1]))
print("            errors  ", *(f"{x:8.1g}" for x in spectrum.errors[:-6:-1]))
print(f"smallest eigenvalue  {float(spectrum.values[0]):8.3f}")
print(f"trace                {float(trace.value):8.3f} +- {float(trace.error):.2f}")
print(f"the largest of the {count} eigenvalues is {top / float(trace.value):.0%} of their sum")

rate = descent_rates[0]
for name, how in {
    "no momentum": {},
    "momentum 0.9": {"momentum": 0.9},
    "Nesterov 0.9": {"momentum": 0.9, "form": "nesterov"},
}.items():
    margin = float(diagnostics.stability_margin(top, rate, **how))
    print(f"{name:>13}: the rate could grow by a factor of {margin:.2f}")
assert float(diagnostics.stability_margin(top, rate, momentum=0.9)) > 1.5

# %% [markdown]
# ## Is the batch too small?
#
# The gradient noise scale is the batch at which noise and signal are equal. Well below it, a larger
# batch saves steps; well above, it only costs. It comes from gradients of two sizes, and the
# micro-batches of one step have them: `micro_batch_norms`. The tracker averages numerator and
# denominator, each by itself.
#
# It is a property of the model and its data, not of the batch in use: two runs with different
# batches find nearly the same. And it grows as training goes on: there is ever less that examples
# agree on.

# %%
MICRO = 8


@functools.partial(jax.jit, static_argnums=(0, 1))
def noise_scales(size, count):
    tx = optlab.lion(schedule)
    tracker = diagnostics.noise_scale_tracker(MICRO, size, decay=0.98)

    def step(run, t):
        params, state, noise = run
        x, y = (a.reshape(size // MICRO, MICRO, *a.shape[1:]) for a in batch(t, size))
        each = jax.vmap(jax.grad(loss), in_axes=(None, 0, 0))(params, x, y)
        noise = tracker.update(noise, *diagnostics.micro_batch_norms(each))
        grads = jax.tree.map(lambda g: g.mean(0), each)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state, noise), noise.metrics()

    start = (beginning, tx.init(beginning), tracker.init())
    return jax.lax.scan(step, start, jnp.arange(count))[1]["noise_scale"]


sizes = [batch_size] if SMOKE else [batch_size, 4 * batch_size]
histories, lasts = {}, []
for size in sizes:
    scales = np.asarray(noise_scales(size, steps))
    about = {"step": np.arange(steps), "batch_size": size}
    histories[f"batch {size}"] = about | {"noise_scale": scales}
    early, late = np.nanmedian(scales[: steps // 5]), np.nanmedian(scales[-steps // 5 :])
    print(f"batch {size}: noise scale {early:.0f} in the first fifth, {late:.0f} in the last")
    lasts.append(late)
    if not SMOKE:
        assert late > 2 * early
assert max(lasts) < 2 * min(lasts)
show(picture.draw_noise_scale, histories)

# %% [markdown]
# ## What does a wrong rate cost?
#
# A method that wins at its best rate may be the worst at three times that. `lr_sensitivity` is the
# mean loss above the best one, over the same grid for every method; a run that diverged counts as
# the loss of guessing. All rates of a method are trained at once, by `jax.vmap`.

# %%
makers = {
    "sgd": lambda rate: optax.sgd(rate, momentum=0.9),
    "adamw": lambda rate: optax.adamw(rate),
    "lion": lambda rate: optlab.lion(rate),
    "muon": lambda rate: optlab.muon(rate),
}


@functools.partial(jax.jit, static_argnums=0)
def final_losses(make, rates):
    def train(rate):
        tx = make(lambda step: rate * optlab.warmup_linear_decay(1.0, steps // 10, steps)(step))

        def step(run, t):
            params, state = run
            grads = jax.grad(loss)(params, *batch(t, batch_size))
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (beginning, tx.init(beginning)), jnp.arange(steps))
        return loss(params, *held_out)

    return jax.vmap(train)(rates)


guessing = math.log(10)
swept = {
    name: (swept_rates, np.asarray(final_losses(make, jnp.asarray(swept_rates))))
    for name, make in makers.items()
}
for name, (rates, losses) in swept.items():
    result = diagnostics.lr_sensitivity(rates, losses, guessing)
    print(f"{name:>6}: best {result.loss:.3f} at {result.learning_rate:g},", end=" ")
    print(f"sensitivity {result.value:.3f}")
    assert result.loss < 0.5 * guessing
show(picture.draw_lr_sensitivity, swept, guessing)

# %% [markdown]
# ## What to take home
#
# - `watch` and `metrics` say which step went wrong, and `skip_bad_steps` leaves it out.
# - Full-batch gradient descent likes to be at the edge. A sharpness far below `stability_limit`
#   says that the rate could be larger.
# - The noise scale says what batch a run can use, now.
# - Compare methods by `lr_sensitivity` as well as by their best runs.
#
# A measure is a function `(updates, new, params) -> scalar`, so one of your own will do. Notebook
# 06 has one.
