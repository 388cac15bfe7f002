"""The workloads of the race: digits and rows, their data, their networks, their command line."""

import dataclasses
import hashlib
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lab_studies import SIZES

from optlab.lab import cli, config, data, model, optimizers, race, study, train
from optlab.lab.config import Config
from optlab.lab.workloads import WORKLOADS

IMAGES = ("digits", "rows")


def tiny(workload, **changes):
    return Config(
        **{**SIZES, **changes},
        preset="quick",
        optimizers=("adamw",),
        learning_rates={"adamw": 1e-2},
        schedule="wsd",
        text=None,
        text_sha256="",
        seed=0,
        workload=workload,
    )


@pytest.fixture(scope="module")
def digits():
    return data.digits()


def rows(digits, count=4):
    return np.frombuffer(digits, np.uint8).reshape(-1, 65)[:count]


def test_every_workload_is_told_and_built():
    assert set(WORKLOADS) == set(model.NETWORKS)
    for name, workload in WORKLOADS.items():
        assert workload.measure.startswith("held-out loss, nats per ")
        assert workload.does.count("{text}") == 1
        assert set(config.preset("quick", name)) == set(SIZES)


def test_digits_are_the_same_everywhere(digits):
    first = "b45f8c8e9bf0a159a7dc9cdacb8d0320"
    assert hashlib.sha256(digits).hexdigest()[:32] == first
    table = rows(digits, -1)
    assert table.shape[1] == 65
    assert set(table[:, -1]) == set(range(10))
    assert table[:, :-1].max() == 16


@pytest.mark.parametrize("workload", IMAGES)
def test_held_out_images_are_never_trained_on(workload, digits):
    corpus = data.make_corpus(digits, tiny(workload))
    table = np.frombuffer(digits, np.uint8).reshape(-1, 65)
    np.testing.assert_array_equal(corpus.train, table[: -data.HELD_OUT_IMAGES])
    assert corpus.held_out.shape == (2, 4, 65)
    held_out = np.asarray(corpus.held_out).reshape(8, 65)
    np.testing.assert_array_equal(held_out, table[-data.HELD_OUT_IMAGES :][:8])


def test_batches_of_images_depend_on_seed_and_step_alone(digits):
    given = tiny("digits")
    train_images = data.make_corpus(digits, given).train
    draw = jax.jit(lambda seed, step: data.batch(train_images, seed, step, given))
    first = draw(0, 5)
    assert first.shape == (4, 65)
    np.testing.assert_array_equal(first, draw(0, 5))
    assert not np.array_equal(first, draw(0, 6))
    assert not np.array_equal(first, draw(1, 5))


def test_convolution_is_the_convolution():
    conv = model.Conv(2, 3, rngs=model.nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 5, 4, 2))
    wanted = jax.lax.conv_general_dilated(
        x, conv.kernel[...], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(conv(x), wanted, rtol=1e-5, atol=1e-6)


def test_gru_is_that_of_the_equations():
    gru = model.GRU(3, 2, rngs=model.nnx.Rngs(0))
    x = np.asarray(jax.random.normal(jax.random.key(1), (1, 4, 3)))
    w, u = np.asarray(gru.inputs.kernel[...]), np.asarray(gru.state.kernel[...])
    state, states = np.zeros(2), []
    sigmoid = lambda z: 1 / (1 + np.exp(-z))  # noqa: E731
    for given in x[0]:
        reset, keep = (sigmoid(given @ w[:, i] + state @ u[:, i]) for i in (slice(2), slice(2, 4)))
        new = np.tanh(given @ w[:, 4:] + reset * (state @ u[:, 4:]))
        state = keep * state + (1 - keep) * new
        states.append(state)
    np.testing.assert_allclose(gru(jnp.asarray(x))[0], states, rtol=1e-5, atol=1e-6)


def test_drawing_does_not_look_at_the_row_it_draws(digits):
    given = tiny("rows", layers=2)
    network = model.nnx.merge(model.abstract(given)[0], model.initial_params(given))
    images, labels = network.split(jnp.asarray(rows(digits, 1)))
    np.testing.assert_array_equal(images, labels)
    before, after = network(images), network(images.at[0, 5].add(3.0))
    assert before.shape == (1, 8, 8, model.GREYS)
    np.testing.assert_array_equal(before[:, :6], after[:, :6])
    assert not np.array_equal(before[:, 6], after[:, 6])


def test_loss_is_that_of_the_labels(digits):
    given, batch = tiny("digits"), jnp.asarray(rows(digits))
    structure, params = model.abstract(given)[0], model.initial_params(given)
    logits = np.asarray(model.logits(structure, params, batch), float)
    labels = np.asarray(batch[:, -1], int)
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    loss = -np.log(shares[range(4), labels]).mean()
    np.testing.assert_allclose(model.loss(structure, params, batch), loss, rtol=1e-5)
    assert abs(loss - math.log(10)) < 1


def test_every_recipe_trains_convolutions_in_a_study():
    params = model.abstract(tiny("digits"))[1]
    setting = study.Setting(jnp.int32(0), jnp.ones(4), jnp.float32(0.1))
    for name in optimizers.names():

        def step(setting, params, name=name):
            tx = study.transform(name, setting)
            return tx.update(params, tx.init(params), params, curvature=None)[0]

        updates = jax.eval_shape(step, setting, params)
        assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params), name


def test_evaluation_is_the_loss_of_all_that_is_held_out(digits):
    given = tiny("digits")
    problem = train.make_problem(given, digits)
    batches = problem.corpus.held_out
    each = [float(model.loss(problem.structure, problem.params, batch)) for batch in batches]
    assert problem.evaluate(problem.params) == pytest.approx(np.mean(each))


FLAGS = ["--steps=4", "--layers=1", "--width=8", "--batch-size=32"]


def test_a_race_on_digits_from_the_command_line(tmp_path, capsys):
    argv = ["race", "--workload=digits", *FLAGS, "--optimizers=sgd", f"--out={tmp_path}"]
    assert cli.main(argv) == 0
    printed = capsys.readouterr().out
    assert "Convolutional net" in printed
    assert "on handwritten digits (1,198 images). 4 steps of 32 images" in printed
    assert "Held-out loss, nats per image:" in printed
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["config"]["workload"] == "digits"
    assert 0 < results["losses"]["sgd"]["final"] < 5
    summary = (tmp_path / "summary.md").read_text()
    assert "held-out loss, nats per image" in summary
    assert "heads" not in summary
    assert cli.main(["race", f"--out={tmp_path}", "--resume", "--workload=rows"]) == 2
    assert "workload was digits, got rows" in capsys.readouterr().err


def test_races_saved_before_there_were_workloads_are_of_the_gpt():
    saved = dataclasses.asdict(tiny("gpt"))
    del saved["workload"]
    assert Config.from_json(saved).workload == "gpt"
    assert race.folder(None, None) == race.folder(None, "quick", "gpt")
    assert race.folder(None, None, "rows").name == "race-rows-quick"


BAD_INPUT = {
    "unknown": (["--workload=mnist"], "gpt, digits, rows, got 'mnist'"),
    "a text for images": (["--workload=rows", "--text=a"], "--text means nothing to --workload"),
    "heads of a GRU": (["--workload=rows", "--heads=2"], "--heads means nothing"),
    "a preset of another": (["--workload=digits", "--preset=medium"], "one of quick, got 'medium'"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_line(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv, says = BAD_INPUT[name]
    assert cli.main(["race", *argv]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert says in message
    assert not list(tmp_path.iterdir())
