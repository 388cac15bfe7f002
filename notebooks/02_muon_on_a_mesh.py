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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/$REPOSITORY/blob/main/notebooks/02_muon_on_a_mesh.ipynb)
#
# # Muon on a mesh
#
# **What happens to my matrices when Muon runs on many devices?**
#
# Muon needs whole matrices: it sets all singular values of a step to about one. On a mesh each
# device has only a slice of each matrix. Left to itself the compiler gathers every slice on every
# device, and each device does all the work. optlab makes a plan instead. We read the plan, look for
# it in the compiled program, and check that the numbers are those of one device.

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
# Without several accelerators this notebook makes eight devices out of the CPU. That has to be said
# before JAX is imported. The plan, the program and the numbers are those of eight real devices; the
# speed is not, so we measure none.

# %%
flag = "--xla_force_host_platform_device_count=8"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()

# %%
# @title Settings
rows = 256  # @param {type:"integer"}
cols = 1024  # @param {type:"integer"}
polar = "keller"  # @param ["keller", "polar_express", "turbo", "cans"]
steps = 60  # @param {type:"integer"}
if SMOKE:
    steps = 12

# %%
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sklearn.datasets import load_digits

import optlab

devices = jax.devices() if jax.device_count() > 1 else jax.devices("cpu")
jax.config.update("jax_default_device", devices[0])
jax.config.update("jax_default_matmul_precision", "highest")  # or a TPU rounds products
count = len(devices)
mesh = jax.make_mesh((count,), ("fsdp",), axis_types=(AxisType.Auto,), devices=devices)
sliced = NamedSharding(mesh, P("fsdp", None))
print(f"{count} devices: {devices[0].device_kind}")

# %% [markdown]
# ## The plan
#
# As many matrices as devices, each cut along its rows, as FSDP does. On an Auto mesh an optimizer
# cannot see inside `jax.jit` where an array lies, so it is told: `shardings_of`.

# %%
keys = jax.random.split(jax.random.key(0), count)
params = {
    f"layer_{i}": {"kernel": jax.device_put(jax.random.normal(key, (rows, cols)), sliced)}
    for i, key in enumerate(keys)
}
shardings = optlab.shardings_of(params)
plan = optlab.plan(params, shardings, polar=polar)
print(plan)

# %% [markdown]
# Read the row. All matrices of a shape travel together. With `all_to_all` each device swaps its
# slices for a matrix of its own, orthogonalizes that one, and hands the slices back: two
# collectives for all of them, and no matrix is worked on twice. Nothing has run so far: the plan
# comes from shapes.
#
# ## What the compiler does with it
#
# A plan is a promise. Here is the program: compiled, its collectives counted, and what each of them
# gives to one device. Beside it is `optax.contrib.muon`, which leaves the matter to the compiler.

# %%
COLLECTIVE = re.compile(r"= (.+?) (all-gather|all-reduce|all-to-all|reduce-scatter)(?:-start)?\(")


def nbytes(types):
    """Bytes of the arrays in a type such as (f32[8,4], f32[8,4])."""
    sizes = {"f32": 4, "bf16": 2, "f16": 2, "s32": 4}
    found = re.findall(r"\b(\w+)\[([\d,]*)\]", types)
    shapes = ((dtype, [int(n) for n in dims.split(",") if n]) for dtype, dims in found)
    return sum(sizes.get(dtype, 4) * int(np.prod(shape)) for dtype, shape in shapes)


def program(tx):
    """Compile one update, and return what its text says."""
    state = jax.eval_shape(tx.init, params)
    place = optlab.state_sharding(tx, params)
    placed = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, place
    )
    compiled = jax.jit(tx.update).lower(params, placed, params).compile()
    found = COLLECTIVE.findall(compiled.as_text())
    return {
        "kinds": Counter(kind for _, kind in found),
        "collectives": len(found),
        "MiB given to a device": sum(nbytes(types) for types, _ in found) / 2**20,
        "GFLOP of a device": compiled.cost_analysis()["flops"] / 1e9,
    }


ours = program(optlab.muon(0.02, polar=polar, shardings=shardings))
theirs = program(optax.contrib.muon(0.02))
for name, found in (("optlab.muon", ours), ("optax.contrib.muon", theirs)):
    kinds = ", ".join(f"{n} {kind}" for kind, n in found["kinds"].items())
    print(f"{name}: {kinds}")
assert ours["kinds"] == plan.collectives
assert ours["collectives"] < theirs["collectives"]

# %% [markdown]
# The program has the collectives of the plan, no more and no fewer: that is the first assert.

# %%
figure, axes = plt.subplots(1, 3, figsize=(11, 3))
for axis, what in zip(axes, list(ours)[1:], strict=True):
    values = [ours[what], theirs[what]]
    bars = axis.barh(["optlab.muon", "optax.contrib.muon"], values, color=[COLOURS[0], FAINT])
    axis.bar_label(bars, [f" {value:.3g}" for value in values])
    axis.set_title(what)
    axis.set_xlim(0, 1.25 * max(values))
    axis.xaxis.set_visible(False)
    axis.spines["bottom"].set_visible(False)
    axis.grid(visible=False)
    axis.invert_yaxis()
axes[1].set_yticks([])
axes[2].set_yticks([])
plt.show()

# %% [markdown]
# With polar="keller" both run the same iteration, so more FLOPs mean that a device works on what
# others work on too. (A loop counts once, in programs that have one.)
#
# ## The numbers are those of one device
#
# A plan that changed the result would be worth nothing. A small network learns handwritten digits
# twice: cut over the mesh, and whole on one device. Every hidden matrix goes through the plan.

# %%
digits = load_digits()
images, labels = jnp.asarray(digits.data / 16, jnp.float32), jnp.asarray(digits.target)
shapes = [(64, 128)] + 4 * [(128, 128)] + [(128, 10)]
names = [f"hidden_{i}" for i in range(len(shapes) - 1)] + ["head"]
start = {
    name: {"kernel": jax.random.normal(key, shape) * (2 / shape[0]) ** 0.5}
    for name, key, shape in zip(names, jax.random.split(jax.random.key(1), 6), shapes, strict=True)
}


def loss_of(params):
    x = images[:512]
    for name in names[:-1]:
        x = jax.nn.relu(x @ params[name]["kernel"])
    logits = x @ params["head"]["kernel"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels[:512]).mean()


def train(params):
    """Train on the devices on which the parameters lie; return the losses and the last state."""
    tx = optlab.muon(0.02, polar=polar, shardings=optlab.shardings_of(params))
    state = jax.jit(tx.init, out_shardings=optlab.state_sharding(tx, params))(params)

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    losses = []
    for _ in range(steps):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    return np.array(losses), params, state


on_mesh, trained, state = train(jax.device_put(start, sliced))
on_one, _, _ = train(start)
apart = np.abs(on_mesh - on_one).max()
print(f"loss {on_mesh[0]:.3f} -> {on_mesh[-1]:.3f}, largest difference {apart:.1e}")
assert apart < 1e-3
assert on_mesh[-1] < on_mesh[0] / 2

# %%
figure, axes = plt.subplots(1, 2, figsize=(11, 3.6))
axes[0].plot(on_one, color=FAINT, lw=5, label="one device")
axes[0].plot(on_mesh, color=COLOURS[0], label=f"mesh of {count}")
axes[0].set(xlabel="step", ylabel="loss", title="The same training, twice")
axes[0].legend()
axes[1].plot(on_mesh - on_one, color=COLOURS[1])
axes[1].set(xlabel="step", ylabel="loss on the mesh - loss on one", title="How far apart they are")
plt.show()

# %% [markdown]
# The momentum lies where its matrix does, so it costs a device its share only. `state_sharding`
# gave `jax.jit` the places. It follows chains, masks and partitions, and serves for restoring a
# checkpoint on another number of devices too.

# %%
of_state = jax.tree.leaves(state)
cut = [leaf for leaf in of_state if leaf.ndim == 2]
whole = sum(leaf.nbytes for leaf in cut)
held = sum(leaf.addressable_shards[0].data.nbytes for leaf in cut)
print(f"moments: {whole:,} bytes in all, {held:,} on each device")
assert all(leaf.sharding == sliced for leaf in cut)
assert held * count == whole

# %% [markdown]
# ## The plan follows the shapes
#
# Fewer matrices than devices would leave some idle; so several devices can share a matrix, if it is
# large enough. Below is the work of the busiest device for 1, 2, 3... matrices, in the colour of
# the scheme. Full rounds go by `all_to_all`, and the rest by what suits it best. The line is what
# each device would do if all of them did everything.


# %%
def planned(matrices):
    """Plan for so many matrices; shapes are enough."""
    leaf = jax.ShapeDtypeStruct((rows, cols), jnp.float32)
    tree = {f"layer_{i}": {"kernel": leaf} for i in range(matrices)}
    return optlab.plan(tree, jax.tree.map(lambda _: sliced, tree), polar=polar)


numbers = range(1, 2 * count + 5)
plans = [planned(n) for n in numbers]
schemes = {s.scheme: None for p in plans for group in p.groups for s in group.steps}
colour = dict(zip(schemes, COLOURS, strict=False))
alone = optlab.plan({"kernel": jnp.ones((rows, cols))}, polar=polar).flops
figure, axes = plt.subplots(1, 2, figsize=(11, 3.8))
for n, p in zip(numbers, plans, strict=True):
    work = traffic = 0
    for s in (s for group in p.groups for s in group.steps):
        axes[0].bar(n, s.flops / alone, bottom=work / alone, color=colour[s.scheme], width=0.8)
        axes[1].bar(n, s.nbytes / 2**20, bottom=traffic / 2**20, color=colour[s.scheme], width=0.8)
        work, traffic = work + s.flops, traffic + s.nbytes
axes[0].plot(numbers, numbers, color=INK, lw=1)
axes[0].set_ylim(0, 1.5 * max(p.flops for p in plans) / alone)
axes[0].set(title="Work of a device, in whole matrices", xlabel="matrices")
axes[1].set(title="MiB that a device receives", xlabel="matrices")
for axis in axes:
    axis.set_xticks(numbers[:: max(1, count // 2)])
axes[0].legend([plt.Rectangle((0, 0), 1, 1, color=c) for c in colour.values()], colour, ncols=3)
plt.show()

print(f"{count} matrices: {plans[count - 1].flops / alone:.2f} matrices' work on each device")
np.testing.assert_allclose(plans[count - 1].flops, alone)
assert all(p.flops <= n * alone for n, p in zip(numbers, plans, strict=True))

# %% [markdown]
# ## A mesh that you do not have
#
# An `AbstractMesh` has no devices, and a plan needs none. Here are the matrices of a LLaMA of seven
# billion parameters on 256 devices, in bfloat16. The mesh is an Explicit one. There the types say
# where arrays lie, and no `shardings` are passed.

# %%
pod = AbstractMesh((256,), ("fsdp",), axis_types=(AxisType.Explicit,))
here = NamedSharding(pod, P("fsdp", None))
sides = {"query": (4096, 4096), "key": (4096, 4096), "value": (4096, 4096), "out": (4096, 4096)}
sides |= {"gate": (4096, 11008), "up": (4096, 11008), "down": (11008, 4096)}
llama = {
    f"block_{i}": {
        name: {"kernel": jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=here)}
        for name, shape in sides.items()
    }
    for i in range(32)
}
large = optlab.plan(llama, polar=polar)
print(large)
total = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(llama))
received = sum(large.nbytes.values())
print(
    f"\n{total / 1e9:.2f} billion entries; a device receives {received / 2**20:.0f} MiB in a step,"
)
print(f"{received / (2 * total):.1%} of what gathering every matrix once would give it")
assert received < 2 * total / 10

# %% [markdown]
# ## Take it with you
#
# - `print(optlab.plan(params))` before you train. A row whose devices are not busy is worth a look.
# - Auto mesh: pass `shardings=optlab.shardings_of(params)`. Explicit mesh: pass nothing.
# - `jax.jit(tx.init, out_shardings=optlab.state_sharding(tx, params))` places the state.
# - Jit the step. Collectives that are called one by one are slow.
