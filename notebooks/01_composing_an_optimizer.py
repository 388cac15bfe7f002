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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/$REPOSITORY/blob/main/notebooks/01_composing_an_optimizer.ipynb)
#
# # Composing an optimizer from parts, in Flax NNX
#
# **Can I put together an optimizer that no paper has, and know what each of its parts does?**
#
# Yes. An optimizer is a chain of links. Each link takes an update and gives back another one. We
# send one gradient through four links and look at it after each. Then we train with the chain, and
# with parts of it, and see which links earn their place.

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
# The settings. Open them in Colab as a form, or edit the numbers.

# %%
# @title Settings
steps = 300  # @param {type:"integer"}
width = 64  # @param {type:"integer"}
batch_size = 128  # @param {type:"integer"}
seeds = 3  # @param {type:"integer"}
decay = 0.1  # @param {type:"number"}
if SMOKE:
    steps, width, seeds = 40, 32, 2

# %%
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import optlab
from optlab import layout

# %% [markdown]
# ## A network and its data
#
# Handwritten digits of 8 x 8 pixels, which scikit-learn brings along. A fifth of them is held out.
#
# Behind each hidden layer sits a batch normalization. So the length of a neuron's weights does not
# matter, only their direction. One of our links makes use of that.


# %%
class Net(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.first = nnx.Linear(64, width, use_bias=False, rngs=rngs)
        self.first_norm = nnx.BatchNorm(width, momentum=0.9, rngs=rngs)
        self.second = nnx.Linear(width, width, use_bias=False, rngs=rngs)
        self.second_norm = nnx.BatchNorm(width, momentum=0.9, rngs=rngs)
        self.head = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, x: jax.Array, *, evaluate: bool = False) -> jax.Array:
        x = jax.nn.relu(self.first_norm(self.first(x), use_running_average=evaluate))
        x = jax.nn.relu(self.second_norm(self.second(x), use_running_average=evaluate))
        return self.head(x)


digits = load_digits()
order = np.random.default_rng(0).permutation(len(digits.target))
images = jnp.asarray(digits.data[order] / 16, jnp.float32)
labels = jnp.asarray(digits.target[order])
held_out = len(order) // 5
train, test = (images[held_out:], labels[held_out:]), (images[:held_out], labels[:held_out])


def loss_of(model, x, y, evaluate=False):
    logits = model(x, evaluate=evaluate)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


print(f"{len(train[1])} digits to train on, {len(test[1])} held out")

# %% [markdown]
# ## One gradient through four links
#
# - `scale_by_sign_momentum`: the sign of a momentum. Every entry is 1 in size. This is Lion's core.
# - `remove_radial`: what would only lengthen or shorten a neuron's weights is taken out.
# - `scale_by_trust_ratio`: the step of a layer becomes as long as the layer's weights.
# - `add_cautious_decay`: weights shrink, but only where the step shrinks them too.
#
# `layout.flax` tells the links which axis of a kernel are the neurons. No link guesses.

# %%
LINKS = {
    "sign momentum": optlab.scale_by_sign_momentum(0.9, 0.99),
    "remove radial": optlab.remove_radial(layout=layout.flax),
    "trust ratio": optlab.scale_by_trust_ratio(zero_norm_ratio=1.0),
    "cautious decay": optlab.add_cautious_decay(decay),
}


def radial_share(update, weights):
    """Length of each neuron's part along its weights, over the length of the whole; the largest."""
    along = jnp.sum(update * weights, 0) / jnp.linalg.norm(weights, axis=0)
    return float(jnp.max(jnp.abs(along) / jnp.linalg.norm(update, axis=0)))


model = Net(rngs=nnx.Rngs(0))
gradient = nnx.jit(nnx.grad(loss_of))(model, train[0][:batch_size], train[1][:batch_size])
params = nnx.state(model, nnx.Param)
kernel = params["second"]["kernel"][...]
update, stages = gradient, {"gradient": gradient["second"]["kernel"][...]}
for name, link in LINKS.items():
    update, _ = link.update(update, link.init(params), params)
    stages[name] = update["second"]["kernel"][...]

print(f"{'after':15} {'largest entry':>13} {'length':>8} {'radial share':>12}")
for name, u in stages.items():
    share = radial_share(u, kernel)
    print(f"{name:15} {jnp.max(jnp.abs(u)):13.4f} {jnp.linalg.norm(u):8.3f} {share:12.4f}")

# %% [markdown]
# Read the table from the top.
#
# - The gradient has no radial part: the loss does not depend on the length of these weights.
# - The sign brings a radial part in, though nobody asked for it. The second link takes it out.
# - The trust ratio makes the step as long as the weights: compare its length with theirs, below.
# - The decay is radial by nature. It comes after the link that would remove it.

# %%
assert radial_share(stages["gradient"], kernel) < 1e-3
assert radial_share(stages["sign momentum"], kernel) > 0.1
assert radial_share(stages["remove radial"], kernel) < 1e-5
assert bool(jnp.all(jnp.abs(stages["sign momentum"]) == 1))
length = float(jnp.linalg.norm(kernel))
np.testing.assert_allclose(jnp.linalg.norm(stages["trust ratio"]), length, rtol=1e-4)
print(f"length of the weights: {length:.3f}")

figure, axes = plt.subplots(1, 5, figsize=(13, 3.4))
for axis, (name, u) in zip(axes, stages.items(), strict=True):
    part = u[:24, :24]
    most = float(jnp.max(jnp.abs(part)))
    axis.imshow(part, cmap="RdBu_r", vmin=-most, vmax=most, interpolation="nearest")
    axis.set_title(name, fontsize=12)
    axis.set_xlabel(f"colours reach {most:.2g}", color=FAINT)
    axis.set(xticks=[], yticks=[])
    axis.grid(visible=False)
figure.suptitle("One gradient, after each link (a corner of the second layer; columns are neurons)")
plt.show()

# %% [markdown]
# The order matters. The radial part is removed before the sign, and the sign brings it back:

# %%
wrong = optax.chain(LINKS["remove radial"], LINKS["sign momentum"])
swapped, _ = wrong.update(gradient, wrong.init(params), params)
share = radial_share(swapped["second"]["kernel"][...], kernel)
print(f"radial share, sign momentum last: {share:.3f}")
assert share > 0.1

# %% [markdown]
# ## Train with it
#
# A chain of links is an `optax.GradientTransformation`: `nnx.Optimizer` takes it as it is.

# %%
rate = optax.scale_by_learning_rate(optlab.wsd(0.01, 10, steps - 20, 10))
optimizer = nnx.Optimizer(model, optax.chain(*LINKS.values(), rate), wrt=nnx.Param)


@nnx.jit
def step(model, optimizer, x, y):
    loss, grads = nnx.value_and_grad(loss_of)(model, x, y)
    optimizer.update(model, grads)
    return loss


draw = np.random.default_rng(0)
losses = []
for _ in range(steps):
    batch = draw.choice(len(train[1]), batch_size, replace=False)
    losses.append(step(model, optimizer, train[0][batch], train[1][batch]))
print(f"training loss {losses[0]:.3f} -> {losses[-1]:.3f}")
assert losses[-1] < losses[0] / 2

# %% [markdown]
# What did every leaf get? `describe` says how the layout reads it, and what state it has.

# %%
print(optlab.describe(nnx.state(model, nnx.Param), optimizer.tx))

# %% [markdown]
# ## Which links earn their place?
#
# One link more in each row, and two more chains to compare with: Adam, and a Muon made of parts,
# which orthogonalizes the steps of the hidden matrices and leaves all else to sign momentum.
#
# Each chain trains at several rates and from several seeds. Rates and seeds are batched by `vmap`,
# the steps are a `scan`: one program for each chain. The rate is an argument of that program.


# %%
def roles(params):
    """Label the leaves: "matrix" where the layout says so; head, biases, scales: "other"."""

    def label(path, leaf):
        role = layout.role(layout.path_str(path), leaf, layout.flax)
        return "matrix" if role == "matrix" else "other"

    return jax.tree_util.tree_map_with_path(label, params)


muon_of_parts = optax.partition(
    {
        "matrix": optax.chain(
            optlab.interpolate_momentum(0.9, 0.95),
            optlab.orthogonalize(),
            optlab.scale_by_shape("keller"),
        ),
        "other": optax.chain(LINKS["sign momentum"], optax.scale(0.1)),
    },
    roles,
)
sign, radial, trust, cautious = LINKS.values()
CHAINS = {
    "sign": sign,
    "sign, radial": optax.chain(sign, radial),
    "sign, radial, trust": optax.chain(sign, radial, trust),
    "all four": optax.chain(sign, radial, trust, cautious),
    "Muon of parts": muon_of_parts,
    "Adam": optax.scale_by_adam(),
}
if SMOKE:
    CHAINS = {name: CHAINS[name] for name in ("sign", "sign, radial", "Muon of parts")}
RATES = jnp.array([0.0003, 0.001, 0.003, 0.01, 0.03])


@jax.jit
@jax.vmap
def start(seed):
    _, params, rest = nnx.split(Net(rngs=nnx.Rngs(jax.random.key(seed))), nnx.Param, ...)
    return params, rest


structure, _, _ = nnx.split(model, nnx.Param, ...)
starts, keys = start(jnp.arange(seeds)), jax.random.split(jax.random.key(0), steps)


def train_at(tx, rate, params, rest):
    """Train from one start; return the network, and at every step its loss and two lengths."""
    fall = optlab.warmup_linear_decay(rate, steps // 10, steps)
    tx = optax.chain(tx, optax.scale_by_schedule(lambda count: -fall(count)))

    def one(carry, key):
        params, rest, state = carry
        batch = jax.random.randint(key, (batch_size,), 0, len(train[1]))

        def objective(params):
            model = nnx.merge(structure, params, rest, copy=True)
            loss = loss_of(model, train[0][batch], train[1][batch])
            return loss, nnx.state(model, nnx.Not(nnx.Param))

        (loss, rest), grads = jax.value_and_grad(objective, has_aux=True)(params)
        updates, state = tx.update(grads, state, params)
        squares = [jnp.sum(tree["second"]["kernel"][...] ** 2) for tree in (params, updates)]
        return (optax.apply_updates(params, updates), rest, state), (loss, *squares)

    (params, rest, _), curves = jax.lax.scan(one, (params, rest, tx.init(params)), keys)
    return (params, rest), dict(zip(("loss", "weights", "step"), curves, strict=True))


@jax.jit
@jax.vmap
@jax.vmap
def evaluated(params, rest):
    logits = nnx.merge(structure, params, rest)(test[0], evaluate=True)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, test[1]).mean()
    return {"held out": loss, "accuracy": jnp.mean(jnp.argmax(logits, -1) == test[1])}


def sweep(chain):
    """Train at all rates (first axis) from all seeds (second axis)."""
    from_seeds = jax.vmap(lambda rate, start: train_at(chain, rate, *start), (None, 0))
    ends, curves = jax.jit(jax.vmap(from_seeds, (0, None)))(RATES, starts)
    return jax.device_get(curves | evaluated(*ends))


found = {name: sweep(chain) for name, chain in CHAINS.items()}

# %% [markdown]
# Each chain at the best of its rates. The spread is over seeds, of initial weights.

# %%
print(f"{'chain':20} {'best rate':>9} {'held-out loss':>15} {'accuracy':>9}")
best = {}
for name, of in found.items():
    final = np.nan_to_num(of["held out"], nan=np.inf)
    best[name] = int(final.mean(1).argmin())
    mine, share = final[best[name]], of["accuracy"][best[name]].mean()
    loss = f"{mine.mean():.3f} +- {mine.std():.3f}"
    print(f"{name:20} {RATES[best[name]]:9.4f} {loss:>15} {share:9.1%}")
    assert share > 0.7

# %% [markdown]
# Where two spreads overlap, this task cannot tell the chains apart: it is small. What it does show
# is how much each of them minds the rate. Look at how wide the valleys are.

# %%
figure, axis = plt.subplots(figsize=(9, 4.6))
for place, (name, of) in enumerate(found.items()):
    loss = of["held out"]
    axis.fill_between(RATES, loss.min(1), loss.max(1), color=COLOURS[place], alpha=0.15, lw=0)
    axis.plot(RATES, loss.mean(1), "o-", color=COLOURS[place], label=name)
axis.set(xscale="log", yscale="log", xlabel="peak learning rate", ylabel="held-out loss")
axis.set_title(f"Held-out loss after {steps} steps; bands: the extremes of {seeds} seeds")
axis.legend(ncols=2)
plt.show()

# %% [markdown]
# ## What the second link does, to the last digit
#
# A step without a radial part stands at a right angle to the weights. Then Pythagoras holds:
#
# length after squared = length before squared + step squared.
#
# The weights can only grow, and by how much is known. On the left, both chains at the same rate,
# the second one's best. On the right, the second alone: measured, and as Pythagoras adds it up.

# %%
at = best["sign, radial"]
figure, axes = plt.subplots(1, 2, figsize=(11, 4), gridspec_kw={"wspace": 0.1})
for place, name in enumerate(("sign", "sign, radial")):
    weights, step_size = (found[name][key][at].mean(0) for key in ("weights", "step"))
    expected = weights[0] + np.concatenate([[0.0], np.cumsum(step_size)[:-1]])
    off = float(np.max(np.abs(weights / expected - 1)))
    print(f"{name:14} largest deviation from Pythagoras: {off:.2%}")
    assert (off < 1e-3) == (name == "sign, radial")
    axes[0].plot(weights, color=COLOURS[place], label=name)
axes[1].plot(weights, color=COLOURS[1], alpha=0.5, lw=5, label="measured")
axes[1].plot(expected, color=INK, linestyle=(0, (3, 2)), label="Pythagoras")
for axis, title in zip(axes, ("Both chains", "Without the radial part, closer"), strict=True):
    axis.set(xlabel="step", ylabel="squared length of the second layer", title=title)
    axis.legend()
plt.show()

# %% [markdown]
# ## Take it with you
#
# - A link is a pair of functions: `optax.chain`, `optax.partition`, `nnx.Optimizer` take it as is.
# - Look at one gradient before you train: print what each link does to it.
# - Compare chains at the best of several rates each, from several seeds.
#
# Notebook 06 writes a link of its own, and proves that it keeps the contract.
