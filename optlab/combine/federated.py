"""Federated methods: FedAvg-M, SCAFFOLD-M and the two anarchic averagings."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optlab import _checks
from optlab.combine.rounds import Federated, Loss, Method, build


def _mixed(beta: ArrayLike) -> Callable[..., Any]:
    """Return d = beta (g_i - c_i + c) + (1 - beta) g; without controls d = beta g_i + ..."""

    def direction(grad, g, c, own):
        corrected = grad if c is None else grad - own + c
        return beta * corrected + (1 - beta) * g

    return direction


def _plain(grad: Any, g: Any, c: Any, own: Any) -> Any:
    del g, c, own
    return grad


@_checks.explain_calls
def fedavg_m(
    loss: Loss,
    learning_rate: optax.ScalarOrSchedule,
    server: optax.GradientTransformation,
    *,
    beta: ArrayLike = 0.4,
) -> Federated:
    """Average clients whose local steps mix in the last global direction (FedAvg-M).

    Client i, K_i times from x_i = x:  d = beta grad F_i(x_i) + (1 - beta) g;  x_i <- x_i - lr d.
    Server:  g = mean over participants of (x - x_i)/(lr K_i);  x <- x + server(g).

    The momentum pulls every client along with the others: with all clients present it needs no
    bound on how much their data differ. beta = 1 is FedAvg. Not Hsu's FedAvgM, which is
    `beta=1` and a server `optax.sgd(..., momentum=0.9)`.

    Args:
      loss: (params, batch) to a scalar, the mean over a client's batch; any Flax model.
      learning_rate: of the local steps, >= 0, or a schedule of the round.
      server: any optax transformation, for the mean direction; `optax.sgd(lr * K)` sets x to the
        mean of the x_i.
      beta: weight of the client's own gradient, in [0, 1]; 1 is FedAvg. The default is ours, the
        best of three in `benchmarks.federated`.

    Returns:
      A `Federated` of pure functions (init, round); `help(rule.round)` tells how to say which
      clients are away, late or behind. The state holds g and the server's; no client's.

    Example:
      >>> import jax.numpy as jnp, optax, optlab
      >>> loss = lambda p, batch: jnp.sum((p - batch) ** 2) / 2
      >>> rule = optlab.fedavg_m(loss, 0.5, optax.sgd(1.0), beta=1.0)
      >>> p, batches = jnp.zeros(1), jnp.array([[[1.0]], [[3.0]]])  # 2 clients, 1 step each
      >>> p, state = rule.round(p, rule.init(p, 2), batches)
      >>> print(p, state.participation, state.local_loss)
      [2.] 1.0 2.5

    Deviations:
      Unverified: the rule is written from memory of the paper and no authors' code was found.
      g is taken as the mean of the d themselves, which is the same and does not cancel; unequal
      K_i count alike; the paper averages over all clients.

    References:
      Cheng et al., Momentum Benefits Non-IID Federated Learning Simply and Provably,
      arXiv:2306.16504, 2023; Xu et al., FedCM, arXiv:2106.10874, 2021, has the same recursion.
    """
    _checks.check_range("fedavg_m", "a number in [0, 1]", lambda b: 0 <= b <= 1, beta=beta)

    def serve(state, reports):
        mean = reports.mean(reports.directions)
        return mean, mean, None, None

    method = Method(frozenset({"direction"}), _mixed(beta), serve)
    return build("fedavg_m", loss, learning_rate, server, method)


@_checks.explain_calls
def scaffold_m(
    loss: Loss,
    learning_rate: optax.ScalarOrSchedule,
    server: optax.GradientTransformation,
    *,
    beta: ArrayLike = 0.4,
) -> Federated:
    """Correct the drift of sampled clients by control variates, with momentum (SCAFFOLD-M).

    Client i, K_i times:  d = beta (grad F_i(x_i) - c_i + c) + (1 - beta) g;  x_i <- x_i - lr d.
    Of the participants S of N:  c_i' = mean of the client's local gradients;
    c <- c + (1/N) sum_S (c_i' - c_i);  g = mean over S of (x - x_i)/(lr K_i);  x <- x + server(g).

    For rounds that see only some of the clients; costs a tree of the parameters' size per client.
    beta = 1 is SCAFFOLD with its second option for c_i.

    Args:
      loss: (params, batch) to a scalar, the mean over a client's batch; any Flax model.
      learning_rate: of the local steps, >= 0, or a schedule of the round.
      server: any optax transformation, for the mean direction.
      beta: weight of the client's own corrected gradient, in [0, 1]; 1 is SCAFFOLD. The default is
        ours, the best of three in `benchmarks.federated`.

    Returns:
      A `Federated` of pure functions (init, round). The state holds g, c and every c_i.

    Example:
      >>> import jax.numpy as jnp, optax, optlab
      >>> loss = lambda p, batch: jnp.sum((p - batch) ** 2) / 2
      >>> rule = optlab.scaffold_m(loss, 0.5, optax.sgd(1.0))
      >>> p, batches = jnp.zeros(1), jnp.array([[[1.0]], [[3.0]]])
      >>> p, state = rule.round(p, rule.init(p, 2), batches, participants=jnp.array([True, False]))
      >>> print(state.control, state.clients[:, 0])
      [-0.5] [-1.  0.]

    Deviations:
      Unverified: the rule is written from memory of the paper and no authors' code was found.
      Unequal K_i count alike.

    References:
      Cheng et al., arXiv:2306.16504, 2023; Karimireddy et al., SCAFFOLD, arXiv:1910.06378, 2020.
    """
    _checks.check_range("scaffold_m", "a number in [0, 1]", lambda b: 0 <= b <= 1, beta=beta)

    def serve(state, reports):
        mean = reports.mean(reports.directions)
        clients = reports.chosen(reports.gradients, state.clients)
        change = reports.mean_of_all(jax.tree.map(jnp.subtract, clients, state.clients))
        return mean, mean, jax.tree.map(jnp.add, state.control, change), clients

    method = Method(frozenset({"direction", "control", "clients"}), _mixed(beta), serve)
    return build("scaffold_m", loss, learning_rate, server, method)


@_checks.explain_calls
def afa_cd(
    loss: Loss, learning_rate: optax.ScalarOrSchedule, server: optax.GradientTransformation
) -> Federated:
    """Average the clients that happen to have finished (anarchic averaging for cross-device).

    Client i, when it likes, from parameters x_i as old as they are (`start`): K_i steps of SGD of
    its own choice (`local_steps`), G_i = mean of its gradients.
    Server:  x <- x + server(mean over arrivals (`participants`) of G_i).

    Clients that come more often count more; `optlab.afa_cs` mends that. With equal K_i, all
    present and nothing stale it is FedAvg.

    Args:
      loss: (params, batch) to a scalar, the mean over a client's batch; any Flax model.
      learning_rate: of the local steps, >= 0, or a schedule of the round.
      server: any optax transformation, for the mean gradient; the paper's two-sided rates (eta,
        eta_L) are here the one rate of `optax.sgd(eta * eta_L)`.

    Returns:
      A `Federated` of pure functions (init, round). The state is the server's alone.

    Example:
      >>> import jax.numpy as jnp, optax, optlab
      >>> loss = lambda p, batch: jnp.sum((p - batch) ** 2) / 2
      >>> rule = optlab.afa_cd(loss, 0.5, optax.sgd(1.0))
      >>> p, batches = jnp.zeros(1), jnp.array([[[1.0]], [[3.0]]])
      >>> old = jnp.array([[0.0], [-1.0]])  # the second client is behind
      >>> p, state = rule.round(p, rule.init(p, 2), batches, start=old)
      >>> print(p)
      [2.5]

    Deviations:
      Unverified: the rule is written from memory of the paper and no authors' code was found;
      whether eta_L belongs to the server's step is a convention.

    References:
      Yang et al., Anarchic Federated Learning, arXiv:2108.09875, 2021, AFA-CD.
    """

    def serve(state, reports):
        del state
        return reports.mean(reports.gradients), None, None, None

    return build("afa_cd", loss, learning_rate, server, Method(frozenset(), _plain, serve))


@_checks.explain_calls
def afa_cs(
    loss: Loss, learning_rate: optax.ScalarOrSchedule, server: optax.GradientTransformation
) -> Federated:
    """Average the latest report of every client, new or old (anarchic averaging for cross-silo).

    As `optlab.afa_cd`, and the server keeps G_i of all clients, zero before the first:
    x <- x + server(mean over all N clients of the latest G_i).

    No client counts more for coming more often. Costs a tree of the parameters' size per client.

    Args:
      loss: (params, batch) to a scalar, the mean over a client's batch; any Flax model.
      learning_rate: of the local steps, >= 0, or a schedule of the round.
      server: any optax transformation, for the mean gradient; the paper's two-sided rates (eta,
        eta_L) are here the one rate of `optax.sgd(eta * eta_L)`.

    Returns:
      A `Federated` of pure functions (init, round). The state holds every G_i.

    Example:
      >>> import jax.numpy as jnp, optax, optlab
      >>> loss = lambda p, batch: jnp.sum((p - batch) ** 2) / 2
      >>> rule = optlab.afa_cs(loss, 0.5, optax.sgd(1.0))
      >>> p, batches = jnp.zeros(1), jnp.array([[[1.0]], [[3.0]]])
      >>> p, state = rule.round(p, rule.init(p, 2), batches, participants=jnp.array([True, False]))
      >>> print(p, state.clients[:, 0])
      [0.5] [-1.  0.]

    Deviations:
      Unverified: the rule is written from memory of the paper and no authors' code was found;
      whether eta_L belongs to the server's step is a convention. In a round without any arrival
      the server stands still.

    References:
      Yang et al., Anarchic Federated Learning, arXiv:2108.09875, 2021, AFA-CS.
    """

    def serve(state, reports):
        clients = reports.chosen(reports.gradients, state.clients)
        return reports.mean_of_all(clients), None, None, clients

    return build(
        "afa_cs", loss, learning_rate, server, Method(frozenset({"clients"}), _plain, serve)
    )
