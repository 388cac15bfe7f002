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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/$REPOSITORY/blob/main/notebooks/04_schedules_without_a_horizon.ipynb)
#
# # Schedules without a horizon
#
# **How do you train when you do not know for how long?**
#
# A cosine has to be told its last step before its first. Want the model at half the budget, or at
# twice? Train again. This notebook trains once, and takes a finished model out of the run three
# times: by a branch, and by a schedule that decays and goes straight back up. Then it goes on from
# a checkpoint, bit for bit, and lets a run's own gradients write the schedule of the next one.

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
steps = 1200  # @param {type:"integer"}
batch_size = 64  # @param {type:"integer"}
width = 256  # @param {type:"integer"}
decay_share = 0.2  # @param {type:"slider", min:0.1, max:0.5, step:0.1}
peaks = [2e-3, 4e-3, 8e-3]  # @param {type:"raw"}
if SMOKE:
    steps, width, peaks = 120, 64, peaks[1:]

EVERY = max(steps // 60, 1)  # steps between two looks at the held-out loss
steps = 60 * EVERY
BUDGETS = [steps // 4, steps // 2, steps]
WARMUP = steps // 20

# %% [markdown]
# ## Something to learn
#
# The source code of Python's own standard library: predict a byte from the twelve before it. A
# small network, but real text; the last twentieth is held out. Any optimizer takes any schedule.
# Here it is `optax.adamw`, and `optlab.watch` writes its gradient's size down at every step.

# %%
import functools
import sysconfig
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optlab

print("JAX runs on", jax.devices()[0].platform.upper())

library = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
text = np.frombuffer(b"".join(path.read_bytes() for path in library)[:4_000_000], np.uint8)
cut = len(text) - len(text) // 20
train_text, held_out_text = jnp.asarray(text[:cut]), jnp.asarray(text[cut:])
CONTEXT, VECTOR = 12, 16


def init(key):
    keys = iter(jax.random.split(key, 4))

    def dense(m, n):
        return {"kernel": jax.random.normal(next(keys), (m, n)) / m**0.5, "bias": jnp.zeros(n)}

    return {
        "embed": jax.random.normal(next(keys), (256, VECTOR)),
        "hidden": [dense(CONTEXT * VECTOR, width), dense(width, width)],
        "head": dense(width, 256),
    }


def loss(params, windows):
    x = params["embed"][windows[:, :-1]].reshape(len(windows), -1)
    for layer in params["hidden"]:
        x = jax.nn.gelu(x @ layer["kernel"] + layer["bias"])
    logits = x @ params["head"]["kernel"] + params["head"]["bias"]
    labels = windows[:, -1].astype(jnp.int32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def windows(text, starts):
    return text[starts[:, None] + jnp.arange(CONTEXT + 1)]


places = np.linspace(0, len(held_out_text) - CONTEXT - 1, 512 if SMOKE else 4096, dtype=np.int32)
held_out = windows(held_out_text, jnp.asarray(places))


# %%
def optimizer(schedule):
    return optlab.watch(optax.adamw(schedule), [optlab.measures.gradient_mean_abs])


@functools.partial(jax.jit, static_argnames="schedule")
def chunk(schedule, peak, params, state, first):
    """Take EVERY steps; return the run, the held-out loss, and the norms of the gradients."""
    tx = optimizer(lambda step: peak * schedule(step))

    def step(run, t):
        params, state = run
        key = jax.random.fold_in(jax.random.key(1), t)
        starts = jax.random.randint(key, (batch_size,), 0, len(train_text) - CONTEXT)
        grads = jax.grad(loss)(params, windows(train_text, starts))
        updates, state = tx.update(grads, state, params)
        norm = optlab.metrics(state)["gradient_mean_abs"]
        return (optax.apply_updates(params, updates), state), norm

    run, norms = jax.lax.scan(step, (params, state), first + jnp.arange(EVERY))
    return *run, loss(run[0], held_out), norms


def fresh():
    params = init(jax.random.key(0))
    return params, optimizer(optax.constant_schedule(0.0)).init(params)


def train(schedule, peak, end, run=None, first=0):
    """Train from step `first` to step `end`; return the run, its losses and its norms."""
    params, state = run or fresh()
    losses, norms = [], []
    for at in range(first, end, EVERY):
        params, state, held, seen = chunk(schedule, peak, params, state, at)
        losses.append(held)
        norms.append(seen)
    return (params, state), np.asarray(losses), np.asarray(norms).ravel()


# %% [markdown]
# ## Five shapes
#
# Every schedule of optlab and of optax is a function of the step, so it can be drawn before
# anything runs. All have the peak 1 here. Only the first two must be told the end.
#
# - `warmup_linear_decay` and the cosine fall all the way.
# - `infinite` warms up and stays. Nothing in it says how long.
# - `branch` cools a *copy* of it from any step.
# - `wsd_s` decays at every budget and goes straight back up, in one run.
#
# `wsd` is the plateau and its decay in one, for a horizon that you do know.

# %%
cosines = {b: optax.warmup_cosine_decay_schedule(0.0, 1.0, WARMUP, b) for b in BUDGETS}
linear = optlab.warmup_linear_decay(1.0, WARMUP, steps)
forever = optlab.infinite(1.0, constant_value=1.0, warmup_steps=WARMUP, cooldown_steps=0)
branches = {}
for budget in BUDGETS:
    cool = round(decay_share * budget / EVERY) * EVERY
    branches[budget] = (budget - cool, optlab.branch(forever, budget - cool, cool))
wsd_s = optlab.wsd_s(
    1.0, WARMUP, BUDGETS, decay_steps=[b - at for b, (at, _) in branches.items()], decay="linear"
)

at = np.arange(steps + 1)
assert float(forever(2**31 - 1)) == 1.0  # the last step that an int32 can count
assert all(float(schedule(b)) == 0.0 for b, (_, schedule) in branches.items())

figure, axes = plt.subplots(1, 3, figsize=(11, 3), sharey=True)
for budget in BUDGETS:
    axes[0].plot(at[: budget + 1], cosines[budget](at[: budget + 1]), color=COLOURS[0])
axes[0].set_title("A cosine for each budget")
axes[1].plot(at, forever(at), color=FAINT)
for budget, (begin, schedule) in branches.items():
    axes[1].plot(at[begin : budget + 1], schedule(at[begin : budget + 1]), color=COLOURS[1])
axes[1].set_title("infinite, and branches of it")
axes[2].plot(at, wsd_s(at), color=COLOURS[2])
axes[2].set_title("wsd_s: down and back up")
for ax in axes:
    ax.set(xlabel="step", xticks=[0, *BUDGETS], ylim=(0, 1.05))
axes[0].set_ylabel("rate / peak")
plt.show()

# %% [markdown]
# ## The right peak for each
#
# A plateau stays high for long, so it may want another peak than a cosine. To compare two schedules
# at one peak is to choose the winner. So each is trained with three peaks, and its best counts. The
# three are trained at once by `jax.vmap`: the peak is an argument of the step, not a part of the
# program. The cosine gets three peaks for each budget: it is the one to beat.


# %%
def sweep(schedule, end=steps):
    """Train with all peaks; return the best one, its losses and norms, and all final losses."""
    many = jax.vmap(functools.partial(chunk, schedule), in_axes=(0, 0, 0, None))
    params, state = jax.vmap(lambda _: fresh())(jnp.arange(len(peaks)))
    losses, norms = [], []
    for first in range(0, end, EVERY):
        params, state, held, seen = many(jnp.asarray(peaks), params, state, first)
        losses.append(held)
        norms.append(seen)
    losses, norms = np.asarray(losses), np.concatenate(norms, axis=1)
    best = int(np.argmin(losses[-1]))
    return peaks[best], losses[:, best], norms[best], losses[-1]


plateau = optlab.wsd(1.0, WARMUP, branches[steps][0] - WARMUP, steps - branches[steps][0])
found = {f"cosine, {b} steps": sweep(cosines[b], b) for b in BUDGETS}
found |= {"linear": sweep(linear), "plateau": sweep(plateau)}


def show_sweeps():
    print("final held-out loss at the peaks", *(f"{peak:9g}" for peak in peaks))
    for name, (best, _, _, final) in found.items():
        print(f"{name:>31} ", *(f"{x:9.4f}" for x in final), f"  best at {best:g}")


show_sweeps()

# %% [markdown]
# ## One run, three finished models
#
# The blue runs are three cosines, each trained from the start for its own budget, at its own best
# peak. The grey run is one, and never decays. From three of its checkpoints a copy is cooled, in
# orange. On the right `wsd_s` does it in one run, without copies. Look at how steeply the loss
# falls while the rate does, and at what the table says the models cost.

# %%
plateau_peak = found["plateau"][0]
curves = {b: found[f"cosine, {b} steps"][1] for b in BUDGETS}

trunk, run, first = [], None, 0
checkpoints, cooled = {}, {}
for budget, (begin, schedule) in branches.items():
    run, losses, _ = train(forever, plateau_peak, begin, run, first)
    trunk, first = [*trunk, *losses], begin
    checkpoints[budget] = run
    cooled[budget] = train(schedule, plateau_peak, budget, run, begin)[1]
down_and_up = train(wsd_s, plateau_peak, steps)[1]

from_scratch = sum(BUDGETS)
branched = branches[steps][0] + sum(budget - begin for budget, (begin, _) in branches.items())
assert branched < from_scratch
if not SMOKE:
    assert all(cooled[b][-1] < trunk[b // EVERY - 1] for b in BUDGETS[:-1])
    assert all(cooled[b][-1] < 1.01 * curves[b][-1] for b in BUDGETS)
    assert all(down_and_up[b // EVERY - 1] < 1.01 * curves[b][-1] for b in BUDGETS)
print("held-out loss at the budgets  ", *(f"{b:9}" for b in BUDGETS), "  steps in all")
rows = {
    "a cosine each": ([curves[b][-1] for b in BUDGETS], from_scratch),
    "one run, branches": ([cooled[b][-1] for b in BUDGETS], branched),
    "one run, wsd_s": ([down_and_up[b // EVERY - 1] for b in BUDGETS], steps),
}
for name, (losses, cost) in rows.items():
    print(f"{name:>29} ", *(f"{x:9.4f}" for x in losses), f"{cost:10}")

# %%
figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True)
for ax in axes:
    for budget, curve in curves.items():
        ax.plot(EVERY * np.arange(1, len(curve) + 1), curve, color=COLOURS[0], alpha=0.35)
        ax.plot(budget, curve[-1], "o", color=COLOURS[0])
axes[0].plot(EVERY * np.arange(1, len(trunk) + 1), trunk, color=FAINT, label="the run goes on")
for budget, (begin, _) in branches.items():
    curve = cooled[budget]
    x = begin + EVERY * np.arange(len(curve) + 1)
    axes[0].plot(x, [trunk[begin // EVERY - 1], *curve], color=COLOURS[1])
    axes[0].plot(budget, curve[-1], "D", color=COLOURS[1])
axes[0].set_title("branch: the run goes on, a copy is cooled")
axes[1].plot(EVERY * np.arange(1, len(down_and_up) + 1), down_and_up, color=COLOURS[2])
for budget in BUDGETS:
    axes[1].plot(budget, down_and_up[budget // EVERY - 1], "D", color=COLOURS[2])
axes[1].set_title("wsd_s: one run, decayed at every budget")
lowest = min(min(curve) for curve in (*curves.values(), *cooled.values(), down_and_up))
for ax in axes:
    ax.set(xlabel="step", xticks=[0, *BUDGETS], ylim=(lowest - 0.05, max(trunk[3], lowest + 0.3)))
axes[0].set_ylabel("held-out loss, nats per byte")
for ax, colour, name in zip(axes, COLOURS[1:], ("a branch", "wsd_s"), strict=False):
    ax.plot([], [], "D-", color=colour, label=name)
    ax.plot([], [], "o-", color=COLOURS[0], alpha=0.5, label="a cosine for this budget")
    ax.legend()
plt.show()

# %% [markdown]
# ## Go on from a checkpoint
#
# A schedule is a function of the step, and the step is counted in the optimizer's state. So there
# is nothing to rewind and nothing to remember: save parameters and state, restore them anywhere,
# choose a schedule. The checkpoint of the branch becomes two runs: one that cools, one that goes
# on. Both are bit for bit what they would have been without the stop. `restore` refuses what does
# not fit.

# %%
budget = BUDGETS[0]
begin, schedule = branches[budget]
with tempfile.TemporaryDirectory() as folder:
    params, state = checkpoints[budget]
    optlab.checkpoint.save(folder, {"params": params, "state": state}, step=begin)
    params, state = fresh()
    like = {"params": params, "state": state}
    restored = optlab.checkpoint.restore(folder, like)
    other = {"params": {**params, "head": {"kernel": jnp.zeros((3, 3))}}, "state": state}
    try:
        optlab.checkpoint.restore(folder, other)
    except ValueError as error:
        refused = str(error)
print(refused)

resumed = (restored["params"], restored["state"])
assert int(optlab.metrics(resumed[1])["count"]) == begin
assert np.array_equal(train(schedule, plateau_peak, budget, resumed, begin)[1], cooled[budget])
went_on = train(forever, plateau_peak, budget, resumed, begin)[1]
assert np.array_equal(went_on, trunk[begin // EVERY : budget // EVERY])
print(f"from step {begin}: the branch and the run that goes on, both with the very same losses")

# %% [markdown]
# ## Let a run write the next schedule
#
# `refine_schedule` reads the gradient norms of a finished run and returns the schedule that they
# ask for: where gradients are large, steps should be small. For methods like Adam it wants l1
# norms, which `watch` has written down. A run with equal norms gives linear decay back; so the
# difference to the straight line below is what this run has to say. Whether it is worth hearing,
# the table says: compare `refined` with `linear`, at the best peak of each and at the others.

# %%
assert np.allclose(optlab.refine_schedule(np.ones(5)) * 0.8, [0.8, 0.6, 0.4, 0.2, 0.0])

norms = found["linear"][2]
values = optlab.refine_schedule(norms, "adam")
refined = optlab.refined(values)
found["refined"] = sweep(refined)
show_sweeps()

# %%
figure, axes = plt.subplots(1, 3, figsize=(11, 3.6))
axes[0].plot(norms, color=FAINT, linewidth=0.8)
axes[0].set(title="What a run recorded", xlabel="step", ylabel="mean |gradient|", ylim=(0, None))
axes[1].plot(at, linear(at), color=COLOURS[3], label="linear decay")
axes[1].plot(at, refined(at), color=COLOURS[4], label="refined")
axes[1].set(title="The schedule it asks for", xlabel="step", ylabel="rate / peak")
axes[1].legend()
shown = (f"cosine, {steps} steps", "plateau", "linear", "refined")
for name, colour in zip(shown, (COLOURS[i] for i in (0, 1, 3, 4)), strict=True):
    axes[2].plot(peaks, found[name][3], "o-", color=colour, label=name.split(",")[0])
axes[2].set(title="Its loss, and others'", xlabel="peak rate", xscale="log", ylabel="final loss")
axes[2].set_xticks(peaks, [f"{peak:g}" for peak in peaks])
axes[2].minorticks_off()
axes[2].legend()
plt.show()

# %% [markdown]
# ## What to take home
#
# - You know the horizon: `warmup_linear_decay` or `wsd`; `refined` where the norms of a run of the
#   same kind ask for another line.
# - You do not: `infinite`, and a `branch` whenever someone asks for a model.
# - You want one run and several finished models, and no copies: `wsd_s`.
# - Tune the peak for each schedule by itself.
#
# `optlab schedule wsd_s peak_value=1e-3 warmup_steps=100 cycle_ends=1000,2000` draws any of them in
# the terminal.
