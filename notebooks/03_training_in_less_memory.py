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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/$REPOSITORY/blob/main/notebooks/03_training_in_less_memory.ipynb)
#
# # Training in less memory
#
# **How far down can an optimizer's memory go, and what does that cost in loss?**
#
# Adam keeps two numbers for each weight: twice what the weights themselves take. There are three
# ways down: fewer numbers (another method), shorter numbers (codecs), a smaller space (low rank).
# They combine. First we count bytes without allocating any. Then we look at why a small space can
# be enough. Then we train, and draw loss against bytes.

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
layers = 32  # @param {type:"integer"}
rank = 16  # @param {type:"integer"}
every = 50  # @param {type:"integer"}
steps = 300  # @param {type:"integer"}
width = 256  # @param {type:"integer"}
if SMOKE:
    layers, steps, width, every = 2, 60, 64, 20

# %%
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import optlab
from optlab import codecs

# %% [markdown]
# ## The table, from shapes
#
# The leaves of a LLaMA with matrices of 4096 by 4096 and 4096 by 11008, in bfloat16. They are
# shapes only. `state_bytes` traces `init`, so the numbers are exact and nothing is allocated.

# %%
SIDES = dict.fromkeys(("query", "key", "value", "out"), (4096, 4096))
SIDES |= {"gate": (4096, 11008), "up": (4096, 11008), "down": (11008, 4096)}


def shape(*sides):
    return jax.ShapeDtypeStruct(sides, jnp.bfloat16)


llama = {
    f"block_{i}": {name: {"kernel": shape(*sides)} for name, sides in SIDES.items()}
    for i in range(layers)
}
llama |= {"embed": {"embedding": shape(32000, 4096)}, "lm_head": {"kernel": shape(4096, 32000)}}
size = sum(leaf.size for leaf in jax.tree.leaves(llama))
rate = 1e-3
METHODS = {
    "adamw": optax.adamw(rate),
    "lion": optlab.lion(rate),
    "muon": optlab.muon(rate),
    "ldadam": optlab.ldadam(rate, rank=1024),
    "fira": optlab.fira(rate, rank=1024),
    "galore": optlab.galore(rate, rank=1024),
    "apollo": optlab.apollo(rate, rank=256),
    "q_galore": optlab.q_galore(rate, rank=1024),
}
table = {
    name: [optlab.state_bytes(tx, llama), *(optlab.compressed_bytes(tx, llama, b) for b in (8, 4))]
    for name, tx in METHODS.items()
}
print(f"{size / 1e9:.2f} billion weights, {2 * size / 1e9:.1f} GB; the state in GB:\n")
print(f"{'':10} {'as it is':>9} {'int8':>7} {'int4':>7} {'bytes a weight, as it is':>26}")
for name, found in table.items():
    print(f"{name:10}", "{:9.2f} {:7.2f} {:7.2f}".format(*(n / 1e9 for n in found)), end=" ")
    print(f"{found[0] / size:26.2f}")

# %% [markdown]
# Two moments of two bytes make four bytes a weight, and Lion halves them. Codecs store one number
# in one byte or in half of one, and a scale for every 128 of them. They halve or quarter what is
# there, whatever it is.

# %%
np.testing.assert_allclose(table["adamw"][0], 4 * size, rtol=1e-3)
np.testing.assert_allclose(table["lion"][0], 2 * size, rtol=1e-3)
np.testing.assert_allclose(table["adamw"][1], (2 + 2 * 4 / 128) * size, rtol=1e-2)
np.testing.assert_allclose(table["adamw"][2], (1 + 2 * 4 / 128) * size, rtol=1e-2)

figure, axis = plt.subplots(figsize=(9, 4.2))
places = np.arange(len(table))
for i, (name, shade) in enumerate(zip(("as it is", "int8", "int4"), (1, 0.6, 0.3), strict=True)):
    values = [found[i] / 1e9 for found in table.values()]
    axis.barh(places + 0.27 * (i - 1), values, 0.25, color=COLOURS[0], alpha=shade, label=name)
axis.axvline(2 * size / 1e9, color=INK, lw=1)
axis.annotate(" the weights", (2 * size / 1e9, 0.5), color=INK)
axis.set_yticks(places, table)
axis.invert_yaxis()
axis.grid(axis="x")
axis.grid(visible=False, axis="y")
axis.set(xlabel="GB", title=f"State of the optimizer, {size / 1e9:.1f} billion weights")
axis.legend()
plt.show()

# %% [markdown]
# `optlab memory --model llama-7b` prints such a table for every method, and takes files of shapes.
#
# ## Why a small space can be enough
#
# A small network removes noise from handwritten digits. Every batch has new noise, so it cannot be
# learned by heart. We take the gradient of its middle layer, and ask which share of its square lies
# in its first few singular directions.

# %%
digits = load_digits().images.reshape(-1, 64) / 16
digits = jnp.asarray(np.random.default_rng(0).permutation(digits), jnp.float32)
test, train = digits[:256], digits[256:]
noise_on_test = 0.5 * jax.random.normal(jax.random.key(9), test.shape)


def start(seed=0, dtype=jnp.float32):
    sides = {"first": (64, width), "middle": (width, width), "last": (width, 64)}
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        name: {
            "kernel": (jax.random.normal(key, (m, n)) * (2 / m) ** 0.5).astype(dtype),
            "bias": jnp.zeros(n, dtype),
        }
        for key, (name, (m, n)) in zip(keys, sides.items(), strict=True)
    }


def clean(params, x):
    """Weights may be stored in bfloat16; products are computed in float32."""
    for name in ("first", "middle"):
        x = jax.nn.relu(x @ params[name]["kernel"].astype(x.dtype) + params[name]["bias"])
    return x @ params["last"]["kernel"].astype(x.dtype) + params["last"]["bias"]


def error(params, x, noise):
    """Mean squared error, as a share of that of leaving the noise in."""
    return jnp.mean((clean(params, x + noise) - x) ** 2) / 0.25


def batch_of(key):
    which, noise = jax.random.split(key)
    x = train[jax.random.randint(which, (128,), 0, len(train))]
    return x, 0.5 * jax.random.normal(noise, x.shape)


def plain(params, updates, key):
    return optax.apply_updates(params, updates)


def train_with(tx, params, seed=0, apply=plain):
    """Train for all steps; return the weights, and what the state's metrics said at every step."""

    def one(carry, key):
        params, state = carry
        grads = jax.grad(error)(params, *batch_of(key))
        updates, state = tx.update(grads, state, params)
        params = apply(params, updates, jax.random.fold_in(key, 1))
        return (params, state), optlab.metrics(state)

    keys = jax.random.split(jax.random.key(seed), steps)
    (params, _), seen = jax.lax.scan(one, (params, tx.init(params)), keys)
    return params, seen


def falling(rate):
    """Return the last link of a chain: a rate that falls to 0."""
    fall = optlab.warmup_linear_decay(rate, steps // 10, steps)
    return optax.scale_by_schedule(lambda count: -fall(count))


adam = optax.scale_by_adam(b2=0.99)
low = optlab.in_low_rank(adam, rank=rank, every=every)
followed, seen = jax.jit(lambda: train_with(optax.chain(low, falling(0.01)), start()))()
overlap = np.asarray(seen["subspace_overlap"])

figure, axes = plt.subplots(1, 2, figsize=(11, 3.8))
for name, params in (("first step", start()), ("after training", followed)):
    slope = jax.jit(jax.grad(error))(params, *batch_of(jax.random.key(5)))["middle"]["kernel"]
    squares = np.linalg.svd(np.asarray(slope), compute_uv=False) ** 2
    share = np.cumsum(squares) / squares.sum()
    print(f"{name}: {share[rank - 1]:.1%} of the gradient lies in {rank} of {width} directions")
    assert share[rank - 1] > 2 * rank / width
    axes[0].plot(np.arange(1, width + 1), share, label=name)
axes[0].axvline(rank, color=INK, lw=1)
axes[0].annotate(f" rank {rank}", (rank, 0.05))
axes[0].set(
    xlabel="directions", title="Share of the gradient's square", xscale="log", ylim=(0, 1.02)
)
axes[0].legend()
axes[1].plot(overlap, color=COLOURS[2])
axes[1].set(xlabel="step", ylim=(0, 1.02), title="Share of the old subspace in the new one")
plt.show()

# %% [markdown]
# On the right is `subspace_overlap` of `optlab.metrics`: where it is low, the gradient has turned
# since the last refresh, and the moments belong to another basis. `on_refresh="rotate"` turns them
# along.
#
# ## Loss against bytes
#
# Now train. Each row is an assembly of the same parts: what runs, in which space, in how many bits.
# Two rows keep the weights in bfloat16 too. A step that is much smaller than its weight is then
# rounded away. `apply_updates_stochastic` rounds up or down at random instead, so that the mean is
# right.
#
# Each row gets the best of the same rates, from two seeds. Bytes are of weights and state together.


# %%
def coded(tx, codec):
    return optlab.quantize_state(tx, codec, min_size=256)


def stochastic(params, updates, key):
    return optlab.apply_updates_stochastic(params, updates, key)


lion = optlab.scale_by_sign_momentum(0.9, 0.99)
lion_low = optlab.in_low_rank(
    lion,
    rank=rank,
    every=every,
    stagger=True,
    on_refresh="rotate",
    residual=optlab.sign_residual(0.3),
)
eight_bits = coded(adam, codecs.int8())
F32, BF16 = jnp.float32, jnp.bfloat16
ROWS = {
    "SGD": (F32, optax.scale(30.0), plain),
    "Adam": (F32, adam, plain),
    "Adam, 8 bits": (F32, eight_bits, plain),
    "Adam, 4 bits": (F32, coded(adam, codecs.int4()), plain),
    "Adam in low rank": (F32, low, plain),
    "Adam in low rank, 8 bits": (F32, coded(low, codecs.int8()), plain),
    "Lion": (F32, lion, plain),
    "Lion in low rank, signs outside, 8 bits": (F32, coded(lion_low, codecs.int8()), plain),
    "Adam, 8 bits, weights 16": (BF16, eight_bits, plain),
    "Adam, 8 bits, weights 16, stochastic": (BF16, eight_bits, stochastic),
}
if SMOKE:
    ROWS = {name: ROWS[name] for name in list(ROWS)[1::4]}
RATES = jnp.array([0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03])
if SMOKE:
    RATES = RATES[-2:]


def result_of(name):
    """Train at all rates (first axis) and from all seeds (second axis); count the bytes."""
    dtype, direction, apply = ROWS[name]

    def run(rate, seed):
        tx = optax.chain(direction, falling(rate))
        params, _ = train_with(tx, start(seed, dtype), seed, apply)
        return error(params, test, noise_on_test), clean(params, test[:12] + noise_on_test[:12])

    over_seeds = jax.vmap(run, (None, 0))
    errors, pictures = jax.jit(jax.vmap(over_seeds, (0, None)))(RATES, jnp.arange(2))
    params, tx = start(0, dtype), optax.chain(direction, falling(0.001))
    own = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(tx.init(params)))
    assert held == optlab.state_bytes(tx, params)  # what was counted from shapes is what is there
    best = int(np.nan_to_num(errors, nan=np.inf).mean(1).argmin())
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    return {
        "errors": np.asarray(errors),
        "best": best,
        "bytes": (own + held) / size,
        "pictures": np.asarray(pictures[best, 0]),
    }


found = {name: result_of(name) for name in ROWS}
print(f"{'':40} {'bytes a weight':>14} {'best rate':>10} {'noise left, two seeds':>22}")
for name, of in found.items():
    two = " ".join(f"{value:.1%}" for value in of["errors"][of["best"]])
    print(f"{name:40} {of['bytes']:14.2f} {RATES[of['best']]:10.4f} {two:>22}")
    assert of["errors"][of["best"]].max() < 0.9

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5))
labels = []
for place, name in enumerate(sorted(found, key=lambda name: found[name]["errors"].mean(1).min())):
    two = found[name]["errors"][found[name]["best"]]
    colour, at = COLOURS[place % len(COLOURS)], found[name]["bytes"]
    left.plot([at] * 2, two, color=colour, lw=2)
    left.plot(at, two.mean(), "o", color=colour, ms=8)
    below = [y for x, y in labels if abs(x - at) < 1.5]  # labels are not to meet
    labels.append((at, max([two.mean(), *(y + 0.0035 for y in below)])))
    left.annotate(f"   {name}", labels[-1], va="center", fontsize=9, color=colour)
left.set(xlabel="bytes a weight", ylabel="noise left", title="At the best rate; bars: two seeds")
left.set_xlim(3.5, 15)
for name in [name for name in found if name.startswith("Adam") and "low" not in name]:
    right.plot(RATES, found[name]["errors"].mean(1), "o-", label=name)
right.set(xscale="log", yscale="log", xlabel="peak rate", title="At every rate")
right.legend(fontsize=9)
plt.show()

# %% [markdown]
# Two dots whose bars overlap are equal, as far as two seeds can tell. On the right, look at the
# small rates: there plain bfloat16 falls behind, because its small steps are lost.

# %%
if not SMOKE:
    lost, kept = (found[f"Adam, 8 bits, weights 16{how}"]["errors"] for how in ("", ", stochastic"))
    assert lost[0].min() > 1.5 * kept[0].max()
    print(f"at a peak rate of {RATES[0]:.4f}: {lost[0].mean():.0%} left, and {kept[0].mean():.0%}")

least = min(found, key=lambda name: found[name]["bytes"] if name != "SGD" else np.inf)
rows = {
    "clean": test[:12],
    "with noise": test[:12] + noise_on_test[:12],
    "Adam": found["Adam"]["pictures"],
    least: found[least]["pictures"],
}
figure, axes = plt.subplots(len(rows), 1, figsize=(9, 4.4))
for axis, (name, pictures) in zip(axes, rows.items(), strict=True):
    padded = np.pad(np.reshape(pictures, (12, 8, 8)), ((0, 0), (0, 0), (1, 1)))
    axis.imshow(np.concatenate(padded, 1), cmap="gray_r", vmin=0, vmax=1)
    axis.set_title(f"{name}: {found[name]['bytes']:.2f} bytes" if name in found else name)
    axis.axis("off")
plt.show()

# %% [markdown]
# ## Take it with you
#
# - Count first: `optlab.state_bytes(tx, shapes)`, `optlab.compressed_bytes`, or `optlab memory`.
# - `quantize_state(tx, codecs.int8())` goes around anything, and is the first thing to try.
# - `in_low_rank(inner)` runs any `inner` in a subspace; watch `subspace_overlap`.
# - Bytes that you save are bytes of state. Activations and gradients are another matter.
