"""A round of federated learning, whatever the method.

A round: every client takes local steps on its own data, the server takes one step along the mean
of what they report. All clients are computed side by side, by `jax.vmap`; with `axis_name` also
over the devices of a mesh (`optlab.clients_on_mesh`). Clients that are away and stragglers are
arguments of the round, as arrays, so that one compiled program serves every round.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optlab import _checks, _leafwise

Loss = Callable[[Any, Any], jax.Array]
"""`(params, batch)` to a scalar."""


class FederatedState(NamedTuple):
    """What the server knows between rounds. Only `clients` has an axis of clients."""

    count: jax.Array  # int32, (): rounds done
    server: Any  # state of the server's optax transformation
    direction: Any  # like params, float32 or wider: g, the last mean direction; None if not used
    control: Any  # like params, float32 or wider: c of SCAFFOLD; None if not used
    clients: Any  # like params behind (clients,): control c_i, or last gradient G_i; None if unused
    participation: jax.Array  # float32, (): share of the clients that took part in the last round
    local_loss: jax.Array  # float32, (): mean loss over their local steps

    def metrics(self) -> dict[str, jax.Array]:
        """Return what the last round was like."""
        return {"participation": self.participation, "local_loss": self.local_loss}


class Federated(NamedTuple):
    """A federated method.

    init: (params, clients) to the state, clients the number of them.
    round: (params, state, batches) to (params, state). Leaves of `batches` start with the axes
      (clients, local steps). Keywords, each with the clients along its first axis:
      participants, bool (clients,): who reports this round; None for all.
      local_steps, int (clients,): how many of its batches a client gets through; 0 is to be away;
        None for all.
      start, a tree like params behind (clients,): where clients begin, for those that hold older
        parameters; None for the current ones.
      And axis_name: the mapped axis of `jax.shard_map` over which the clients are split. (static)
      What an absent client has computed, NaN or not, does not count. In a round without any
      client only `count` changes, and the two scalars.
    """

    init: Callable[[Any, int], FederatedState]
    round: Callable[..., tuple[Any, FederatedState]]


class Reports(NamedTuple):
    """What a round's clients send: means over their local steps; zero of those that are away."""

    directions: Any  # trees behind (clients,)
    gradients: Any
    present: jax.Array  # bool, (clients,)
    axis_name: str | None

    def total(self, tree: Any) -> Any:
        """Sum over all clients, also of other devices."""
        summed = jax.tree.map(lambda x: jnp.sum(x, axis=0), tree)
        return summed if self.axis_name is None else jax.lax.psum(summed, self.axis_name)

    def mean(self, tree: Any) -> Any:
        """Average over the clients that took part."""
        count = jnp.maximum(self.total(self.present.astype(jnp.float32)), 1)
        return jax.tree.map(lambda x: x / count.astype(x.dtype), self.total(tree))

    def mean_of_all(self, tree: Any) -> Any:
        """Average over all clients, zeros of those that are away among them."""
        count = self.total(jnp.ones_like(self.present, jnp.float32))
        return jax.tree.map(lambda x: x / count.astype(x.dtype), self.total(tree))

    def chosen(self, new: Any, old: Any) -> Any:
        """Take the new entries of those who took part, the old ones of the others."""
        return jax.tree.map(lambda n, o: jnp.where(_column(self.present, n), n, o), new, old)


class Method(NamedTuple):
    """What tells the methods apart."""

    keeps: frozenset[str]  # of the state's `direction`, `control` and `clients`, what is used
    direction: Callable[..., Any]  # (gradient, g, c, c_i) of one entry to the local step's
    server: Callable[[FederatedState, Reports], tuple]  # to pseudo-gradient and the three slots


def _column(values: jax.Array, like: jax.Array) -> jax.Array:
    return values.reshape(-1, *(1,) * (like.ndim - 1))


def _wide_zeros(params: Any, *front: int) -> Any:
    return jax.tree.map(lambda p: jnp.zeros((*front, *p.shape), _leafwise.widen(p.dtype)), params)


def _apart(tree: Any, axis_name: str | None) -> Any:
    """Return the tree as each device's own, which local steps make of it."""
    if axis_name is None:
        return tree
    zero = jax.lax.pcast(jnp.zeros([]), axis_name, to="varying")
    return jax.tree.map(lambda x: x + zero.astype(x.dtype), tree)


def _mapped(fn: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """Map over leaves; another tree that is None gives None."""
    flat, treedef = jax.tree.flatten(tree)
    columns = [[None] * len(flat) if o is None else treedef.flatten_up_to(o) for o in others]
    return jax.tree.unflatten(treedef, [fn(*x) for x in zip(flat, *columns, strict=True)])


def _local(
    loss: Loss, rate: jax.Array, direction: Callable[..., Any], state: FederatedState
) -> Callable[..., tuple]:
    """Return a client's work: (x, its slot, batches, steps) to means over its steps."""

    def work(x, own, batches, steps):
        def step(carry, numbered):
            x, *sums = carry
            index, batch = numbered
            value, grad = jax.value_and_grad(loss)(x, batch)
            grad = jax.tree.map(lambda g: g.astype(_leafwise.widen(g.dtype)), grad)
            move = _mapped(direction, grad, state.direction, state.control, own)
            moved = jax.tree.map(lambda p, d: (p - rate * d).astype(p.dtype), x, move)
            added = jax.tree.map(jnp.add, tuple(sums), (move, grad, value.astype(jnp.float32)))
            pick = lambda new, old: jnp.where(index < steps, new, old)  # noqa: E731
            return jax.tree.map(pick, (moved, *added), carry), None

        count = len(jax.tree.leaves(batches)[0])
        zeros = jax.tree.map(lambda p: jnp.zeros_like(p, _leafwise.widen(p.dtype)), x)
        nothing = jnp.zeros_like(steps, jnp.float32)
        start = (x, zeros, zeros, nothing)
        (_, *sums), _ = jax.lax.scan(step, start, (jnp.arange(count), batches))
        return jax.tree.map(lambda s: s / jnp.maximum(steps, 1).astype(s.dtype), tuple(sums))

    return work


def _counts(name: str, batches: Any) -> tuple[int, int]:
    """Return the numbers of clients and of local steps that all batches agree on."""
    named, _, _ = _leafwise.aligned(name, batches)
    shapes = [(path, jnp.shape(x)) for path, x in named if x is not None]
    front = shapes[0][1][:2] if shapes else ()
    wrong = [(path, shape) for path, shape in shapes if len(front) < 2 or shape[:2] != front]
    if wrong or not shapes:
        path, shape = wrong[0] if wrong else ("", ())
        raise ValueError(
            f"{name}: batches must start with the axes (clients, local steps), got shape {shape} "
            f"at '{path}'{f' beside {front}' if len(front) == 2 else ''}. Give every client as "
            "many batches as the one that takes the most steps, and local_steps."
        )
    return front[0], front[1]


def _per_client(name: str, argument: str, value: Any, default: Any, clients: int) -> jax.Array:
    given = jnp.full(clients, default) if value is None else jnp.asarray(value)
    if given.shape != (clients,):
        raise ValueError(
            f"{name}: {argument} must be one per client, got shape {given.shape} for {clients} "
            "clients. The batches' first axis is that of the clients."
        )
    return given


def build(
    name: str,
    loss: Loss,
    learning_rate: optax.ScalarOrSchedule,
    server: optax.GradientTransformation,
    method: Method,
) -> Federated:
    """Build the rounds of a method: the work of the clients, then that of the server."""
    if not callable(loss):
        fix = " Pass lambda params, batch: ..."
        raise _checks.refusal(TypeError, name, "loss", "a function of (params, batch)", loss, fix)
    _checks.check_nonnegative(name, schedule=True, learning_rate=learning_rate)
    _checks.check_transform(name, "server", server)

    def init(params, clients):
        _checks.check_steps(name, 1, clients=clients)
        return FederatedState(
            count=jnp.zeros([], jnp.int32),
            server=server.init(params),
            direction=_wide_zeros(params) if "direction" in method.keeps else None,
            control=_wide_zeros(params) if "control" in method.keeps else None,
            clients=_wide_zeros(params, clients) if "clients" in method.keeps else None,
            participation=jnp.zeros([], jnp.float32),
            local_loss=jnp.zeros([], jnp.float32),
        )

    def round_(
        params, state, batches, *, participants=None, local_steps=None, start=None, axis_name=None
    ):
        clients, most = _counts(name, batches)
        steps = _per_client(name, "local_steps", local_steps, most, clients)
        present = _per_client(name, "participants", participants, True, clients) & (steps > 0)
        repeat = lambda p: jnp.broadcast_to(p[None], (clients, *p.shape))  # noqa: E731
        begin = jax.tree.map(repeat, params) if start is None else start
        steps = jnp.clip(steps, 0, most)
        present, steps, begin, direction, control = _apart(
            (present, steps, begin, state.direction, state.control), axis_name
        )
        shared = state._replace(direction=direction, control=control)
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        work = _local(loss, jnp.asarray(rate), method.direction, shared)
        sums = jax.vmap(work)(begin, state.clients, batches, steps)
        # Zero and not left out of sums: what an absent client computed may be NaN.
        sent = lambda x: jnp.where(_column(present, x), x, 0)  # noqa: E731
        moves, gradients, losses = jax.tree.map(sent, sums)
        reports = Reports(moves, gradients, present, axis_name)
        return _serve(server, method, params, state, reports, losses)

    round_.__name__, round_.__doc__ = f"{name}.round", Federated.__doc__
    return Federated(init, _checks.explain_calls(round_))


def _serve(
    server: optax.GradientTransformation,
    method: Method,
    params: Any,
    state: FederatedState,
    reports: Reports,
    losses: jax.Array,
) -> tuple[Any, FederatedState]:
    """Step along what the method makes of the reports; nothing moves if there are none."""
    pseudo, direction, control, clients = method.server(state, reports)
    pseudo = jax.tree.map(lambda d, p: d.astype(p.dtype), pseudo, params)
    updates, inner = server.update(pseudo, state.server, params)
    share = reports.mean_of_all(reports.present.astype(jnp.float32))
    new = (optax.apply_updates(params, updates), inner, direction, control)
    old = (params, state.server, state.direction, state.control)
    kept = jax.tree.map(lambda n, o: jnp.where(share > 0, n, o), new, old)
    params, inner, direction, control = kept
    count, heard = _leafwise.increment(state.count), reports.mean(losses)
    return params, FederatedState(count, inner, direction, control, clients, share, heard)
