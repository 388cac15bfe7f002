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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/$REPOSITORY/blob/main/notebooks/06_your_own_method.ipynb)
#
# # Your own method
#
# **You have an idea for an optimizer. How do you come to trust it?**
#
# It is one line of mathematics, and then: zeros, infinities, bfloat16, missing gradients, eight
# devices. This notebook writes a small transformation, lets the contract of optlab find what is
# wrong with it, proves the repaired one, plants five defects to see them caught, and trains with it
# in Flax NNX. The method is made up here; no paper stands behind it.

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

# %% [markdown]
# The contract runs on meshes of eight devices. A CPU can pretend to have them, if it is told so
# before JAX is imported. So this notebook stays on the CPU.

# %%
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

# %%
# @title Settings
steps = 400  # @param {type:"integer"}
batch_size = 64  # @param {type:"integer"}
width = 64  # @param {type:"integer"}
softness = 1.0  # @param {type:"number"}
swept_softness = [0.0, 0.3, 1.0, 3.0]  # @param {type:"raw"}
swept_rates = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1]  # @param {type:"raw"}
if SMOKE:
    steps, width, swept_softness, swept_rates = 60, 16, [0.0, 1.0], [1e-3, 1e-2]

# %%
import functools
import math
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import optlab
from optlab import layout, testing

print(jax.device_count(), "devices")

# %% [markdown]
# ## The idea
#
# Lion steps by the sign of its momentum c: an entry that is nearly zero, and may be noise, moves as
# far as the largest. A softer sign would let it move less. What is small is a question of the
# neuron: take the root mean square of c over the inputs of each.
#
#     u = c / sqrt(c^2 + (softness rms)^2)
#
# With softness 0 this is the sign. Which axes of a leaf are the inputs of a neuron? Never guess: a
# *layout* says it, and `map_with_view` asks the layout, leaf by leaf. A bias has no view; it is one
# neuron to us. `optax.stateless` does the rest.


# %%
def first_try(softness=1.0):
    def leaf(view, path, c):
        inputs = view.within_channel if view else None
        rms = jnp.sqrt(jnp.mean(c**2, inputs, keepdims=True))
        return c / jnp.sqrt(c**2 + (softness * rms) ** 2)

    return optax.stateless(
        lambda updates, params: layout.map_with_view(leaf, updates, policy=layout.flax)
    )


# %% [markdown]
# ## What the contract says
#
# `optlab.testing` has a check for each promise that a transformation makes. Tags say what yours
# promises: it keeps no state, every leaf is on its own, ten times the gradient changes nothing.
# `check_transform` raises at the first check that fails. Here all are run, to see them all.

# %%
TAGS = {"stateless", "layerwise", "scale_invariant"}
# Flax names: the layout knows them. Leave it out, and ranks 0 to 4 are tried.
TREE = testing.random_like({"dense": {"bias": (16,), "kernel": (8, 16)}}, seed=0)


def failures(make):
    """Return what each failing check found."""
    case = testing.Case(make.__name__, make, frozenset(TAGS), lambda: TREE)
    found = {}
    for name in testing.checks_for(case.selectors):
        try:
            testing.run_check(case, name)
        except AssertionError as error:
            found[name] = str(error)
    return found


print(len(testing.checks_for(TAGS)), "checks")
found = failures(first_try)
for message in found.values():
    print(textwrap.fill(message, 96, initial_indent="* ", subsequent_indent="  "))
assert set(found) == {"extreme_grads_finite", "zero_grads_finite", "zero_params_finite"}

# %% [markdown]
# Nothing about dtypes, meshes or missing leaves: `map_with_view` and `jnp` saw to that. But a dead
# neuron, whose gradient is zero, would be 0/0, and stay NaN. And the square of a small gradient is
# zero in float32 long before the gradient is.
#
# ## The repaired one
#
# Divide by the largest entry first, compute in float32 or wider, say what zero means.


# %%
def soften_by_neuron(softness: float = 1.0, *, layout_policy=layout.flax):
    """Let entries that are small for their neuron move less than the sign would.

    u = c / sqrt(c^2 + (softness rms)^2), rms over the inputs of each neuron; 0 for a zero neuron.
    """
    if not softness >= 0:
        raise ValueError(f"soften_by_neuron: softness must be >= 0, got {softness}. Write 1.0.")

    def leaf(view, path, c):
        inputs = view.within_channel if view else None
        wide = c.astype(jnp.promote_types(c.dtype, jnp.float32))
        largest = jnp.max(jnp.abs(wide), inputs, keepdims=True, initial=0.0)
        x = wide / jnp.where(largest > 0, largest, 1)
        size = jnp.sqrt(x**2 + softness**2 * jnp.mean(x**2, inputs, keepdims=True))
        return (x / jnp.where(size > 0, size, 1)).astype(c.dtype)

    return optax.stateless(
        lambda updates, params: layout.map_with_view(leaf, updates, policy=layout_policy)
    )


testing.check_transform(soften_by_neuron, tags=TAGS, tree=TREE)
print("all", len(testing.checks_for(TAGS)), "checks pass")

# %% [markdown]
# The contract does not know what the method is *for*. Two laws of its own do: each neuron is by
# itself, and without softness it is the sign. A law of one line is worth a thousand steps of
# training.


# %%
def softened(c, softness=softness):
    tx = soften_by_neuron(softness)
    tree = {"dense": {"kernel": c}}
    return tx.update(tree, tx.init(tree))[0]["dense"]["kernel"]


c = np.random.default_rng(0).normal(size=(24, 12)).astype(np.float32)  # (inputs, neurons)
louder = c * np.where(np.arange(12) == 3, 100, 1).astype(np.float32)
np.testing.assert_allclose(softened(louder), softened(c), rtol=1e-5)
np.testing.assert_allclose(softened(c, 0.0), np.sign(c), rtol=1e-5)

figure, axes = plt.subplots(1, 4, figsize=(11, 4), width_ratios=(1, 1, 1, 1.6))
matrices = {"momentum": louder, "its sign": np.sign(louder), "softened": softened(louder)}
for ax, (title, x) in zip(axes, matrices.items(), strict=False):
    largest = float(np.abs(x).max())
    ax.imshow(x, cmap="RdBu_r", vmin=-largest, vmax=largest, aspect="auto")
    ax.set(title=title, xlabel="neuron", xticks=[3], yticks=[])
    ax.grid(visible=False)
axes[0].set_ylabel("input")
line = np.linspace(-3, 3, 301)
for s, colour in zip((0.0, 0.3, 1.0, 3.0), COLOURS, strict=False):
    axes[3].plot(line, line / np.sqrt(line**2 + s**2 + 1e-12), color=colour, label=f"{s:g}")
axes[3].set(title="softness", xlabel="entry / rms of its neuron", ylabel="step / rate")
axes[3].legend()
plt.show()

# %% [markdown]
# On the left neuron 3 has a hundred times the gradient of the others: all that can be seen of the
# matrix. The sign is blind to sizes, within a neuron too. The soft sign sees each neuron's own.
#
# ## Would it have noticed?
#
# A check that cannot fail proves nothing. Five defects, each a line that somebody could write:


# %%
def followed_by(wrong):
    """Return a maker of the healthy method with something wrong behind it."""
    return lambda: optax.chain(soften_by_neuron(), optax.stateless(lambda u, params: wrong(u)))


def number_in_the_state():
    keeps = optax.GradientTransformation(
        lambda params: {"softness": 1.0}, lambda updates, state, params=None: (updates, state)
    )
    return optax.chain(soften_by_neuron(), keeps)


calls = []


def counted(u):
    calls.append(1)
    return jax.tree.map(lambda x: x / len(calls), u)


def filled(u):
    return jax.tree.map(lambda x: jnp.zeros([]) if x is None else x, u, is_leaf=lambda x: x is None)


def seen_by_all(u):
    return jax.tree.map(lambda x: x / (1 + optax.tree.norm(u)), u)


def in_float32(u):
    return jax.tree.map(lambda x: x.astype(jnp.float32), u)


DEFECTS = {
    "a bfloat16 gradient comes out in float32": followed_by(in_float32),
    "a missing gradient comes out as zeros": followed_by(filled),
    "leaves see each other": followed_by(seen_by_all),
    "calls are counted in Python": followed_by(counted),
    "a Python number is kept in the state": number_in_the_state,
}
caught = {}
for defect, make in DEFECTS.items():
    try:
        testing.check_transform(make, tags=TAGS, tree=TREE)
    except AssertionError as error:
        caught[defect] = str(error)
for defect, message in caught.items():
    print(f"{defect}: {message.split(': ')[1]}")
    claim = message.split(" Claim: ")[1]
    print(textwrap.fill(claim, 96, initial_indent="    ", subsequent_indent="    "))
assert list(caught) == list(DEFECTS)

# %% [markdown]
# ## A recipe
#
# A method is a sentence, links are its words. In front Lion's momentum; behind it a decay that acts
# only where it agrees with the step; last the rate, with the only minus sign. `watch` stands around
# our link, with a measure of our own: the share of entries that take nearly a whole step.
#
# The tag `recipe` adds checks: it descends, takes schedules, works in `nnx.Optimizer` and in
# Linen's `TrainState`. `state_bytes` holds us to what we say about memory.


# %%
def whole_steps(updates, new, params):
    """Return the share of entries that came out above 0.9."""
    entries = sum(u.size for u in jax.tree.leaves(new))
    return sum(jnp.sum(jnp.abs(u) > 0.9) for u in jax.tree.leaves(new)) / max(entries, 1)


def soft_lion(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    *,
    b1: float = 0.9,
    b2: float = 0.99,
    softness: float = 1.0,
    weight_decay: float = 0.0,
):
    return optax.chain(
        optlab.interpolate_momentum(b1, b2),
        optlab.watch(soften_by_neuron(softness), [whole_steps]),
        optlab.add_cautious_decay(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


PROMISES = {"recipe", "layerwise", "scale_invariant"}
testing.check_transform(soft_lion, tags=PROMISES, tree=TREE, facts={"state_bytes": 4.0})
print("all", len(testing.checks_for({*PROMISES, "state_bytes"})), "checks pass")

hard = soft_lion(0.1, softness=0.0)
lion = optlab.lion(0.1)
grads = testing.random_like(TREE, seed=1)
ours, theirs = (tx.update(grads, tx.init(TREE), TREE)[0] for tx in (hard, lion))
jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), ours, theirs)
print("without softness it is Lion")

# %% [markdown]
# ## In a loop
#
# scikit-learn's digits, a small network in Flax NNX. Nothing here knows that the method is new.

# %%
digits = load_digits()
order = np.random.default_rng(0).permutation(len(digits.data))
images = digits.data[order].astype(np.float32) / 16
images = jnp.asarray(images - images.mean(0))
labels = jnp.asarray(digits.target[order], jnp.int32)
held_out = images[1400:], labels[1400:]


class Network(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(64, width, rngs=rngs)
        self.second = nnx.Linear(width, width, rngs=rngs)
        self.head = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.gelu(self.second(nnx.gelu(self.first(x)))))


def loss(model, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


def batch(step):
    key = jax.random.fold_in(jax.random.key(1), step)
    chosen = jax.random.randint(key, (batch_size,), 0, 1400)
    return images[chosen], labels[chosen]


unit = optlab.warmup_linear_decay(1.0, steps // 10, steps)
model = Network(nnx.Rngs(0))
tx = soft_lion(lambda step: 1e-3 * unit(step), softness=softness, weight_decay=0.1)
optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)


@nnx.jit
def step(model, optimizer, t):
    value, grads = nnx.value_and_grad(loss)(model, *batch(t))
    optimizer.update(model, grads)
    return value, optlab.metrics(optimizer.opt_state)["whole_steps"]


seen = np.asarray([step(model, optimizer, t) for t in range(steps)])
right = float(jnp.mean(model(held_out[0]).argmax(-1) == held_out[1]))
print(f"loss {seen[0, 0]:.3f} at first, {seen[-10:, 0].mean():.3f} in the last ten steps;", end=" ")
print(f"{right:.1%} of the held-out digits are read rightly")
assert seen[-10:, 0].mean() < seen[0, 0]
assert SMOKE or right > 0.9

figure, axes = plt.subplots(1, 2, figsize=(11, 3.2))
axes[0].plot(seen[:, 0], color=COLOURS[0])
axes[0].set(title="Loss of each batch", xlabel="step", ylim=(0, None))
axes[1].plot(seen[:, 1], color=COLOURS[1], label="this run")
bell = math.erfc(softness * 0.9 / math.sqrt(2 * (1 - 0.9**2)))
axes[1].axhline(bell, color=FAINT, linestyle=":", label="if momentum were normal")
axes[1].set(title="Entries that take a whole step", xlabel="step", ylim=(0, 2 * seen[:, 1].max()))
axes[1].yaxis.set_major_formatter("{x:.0%}")
axes[1].legend()
plt.show()

# %% [markdown]
# ## Is it any good?
#
# A fair first answer: the same model, the same data, several rates and seeds for each, beside Lion
# and AdamW. Look at the bands before you call a winner. And this is one small problem: a claim
# takes more of them, and a tuning budget that is the same for all.

# %%
SEEDS = range(2 if SMOKE else 3)
networks = [nnx.split(Network(nnx.Rngs(seed)), nnx.Param) for seed in SEEDS]
structure = networks[0][0]
beginnings = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[params for _, params in networks])
chosen = np.random.default_rng(0).integers(0, 1400, (len(SEEDS), steps, batch_size))


@functools.partial(jax.jit, static_argnums=0)
def final_losses(make, rates):
    def train(rate, params, chosen):
        tx = make(lambda step: rate * unit(step))

        def step(run, i):
            params, state = run
            x, y = images[i], labels[i]
            grads = jax.grad(lambda p: loss(nnx.merge(structure, p), x, y))(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), chosen)
        return loss(nnx.merge(structure, params), *held_out)

    seeds = jax.vmap(train, (None, 0, 0))
    return jax.vmap(seeds, (0, None, None))(rates, beginnings, jnp.asarray(chosen))


makers = {"adamw": lambda rate: optax.adamw(rate, weight_decay=0.1)}
for s in swept_softness:
    name = f"softness {s:g}" if s else "softness 0: Lion"
    makers[name] = lambda rate, s=s: soft_lion(rate, softness=s, weight_decay=0.1)
swept = {name: np.asarray(final_losses(m, jnp.asarray(swept_rates))) for name, m in makers.items()}
print(f"{'held-out loss at the rates':>28}", *(f"{rate:8g}" for rate in swept_rates))
for name, losses in swept.items():
    print(f"{name:>28}", *(f"{x:8.3f}" for x in losses.mean(1)), end="")
    print(f"   best: {losses.mean(1).min():.3f}, seeds {losses[losses.mean(1).argmin()].round(3)}")

# %%
figure, ax = plt.subplots(figsize=(9, 4.6))
for (name, losses), colour in zip(swept.items(), (FAINT, *COLOURS), strict=False):
    ax.plot(swept_rates, losses.mean(1), "o-", color=colour, label=name)
    ax.fill_between(
        swept_rates, losses.min(1), losses.max(1), color=colour, alpha=0.15, linewidth=0
    )
ax.set(title="Line: mean of the seeds. Band: all of them.", xscale="log", yscale="log")
ax.set(xlabel="peak rate", ylabel="held-out loss")
ax.xaxis.set_major_formatter("{x:g}")
ax.yaxis.set_major_formatter("{x:g}")
ax.legend()
plt.show()

# %% [markdown]
# ## What to take home
#
# - Ask the layout which axes are which. Guard each division, and say what zero means.
# - Run `check_transform` before the first step of training.
# - Add the laws that only your method has. Plant a defect, and see it caught.
# - To bring a method into optlab itself, read CONTRIBUTING.md.
