"""Damaged checkpoints, and checkpoints of something else, are refused with what differs."""

import json
import shutil
from collections import OrderedDict

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest

from optlab import checkpoint
from optlab.state.folders import SEAL, fingerprints
from optlab.state.manifest import MANIFEST

PARAMS = {"a": jnp.arange(12.0).reshape(3, 4), "b": jnp.ones(4), "c": None}
CONFIG = {"method": "adam", "lr": 0.1, "schedule": {"steps": 10}}


def tree(tx=None, params=PARAMS):
    return {"params": params, "state": (tx or optax.adam(0.1)).init(params)}


LIKE = tree()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One whole checkpoint, not to be changed."""
    root = tmp_path_factory.mktemp("whole")
    checkpoint.save(root, LIKE, step=3, config=CONFIG)
    return root


@pytest.fixture
def saved(whole, tmp_path):
    """A copy of the checkpoint to damage."""
    return shutil.copytree(whole, tmp_path / "run")


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


def biggest(folder):
    return max(files(folder / "arrays"), key=lambda path: (path.stat().st_size, path))


def reseal(folder):
    """What someone does who wants the damage to be believed."""
    sums = fingerprints(folder)
    (folder / SEAL).write_text(json.dumps(sums, indent=1, sort_keys=True))


def edit(change, *, sealed=True):
    """Return a damage of the manifest, with a seal made anew or not."""

    def damage(folder):
        record = json.loads((folder / MANIFEST).read_text())
        change(record)
        (folder / MANIFEST).write_text(json.dumps(record))
        if sealed:
            reseal(folder)

    return damage


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def swap(one, other):
    one_content, other_content = one.read_bytes(), other.read_bytes()
    one.write_bytes(other_content)
    other.write_bytes(one_content)


def set_leaf(index, column, value):
    def change(record):
        record["leaves"][index][column] = value

    return edit(change)


def exchange(record):
    leaves = record["leaves"]
    leaves[0], leaves[1] = leaves[1], leaves[0]


def drop_leaf(record):
    del record["leaves"][0]


def only_half(folder):
    """What a kill leaves, under the name of a whole step."""
    (folder / SEAL).unlink()
    (folder / MANIFEST).unlink()


def unnamed(folder):
    folder.rename(folder.with_suffix(".part"))


def by_orbax(folder):
    """The same arrays, written by orbax alone."""
    shutil.rmtree(folder)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, {"a": PARAMS["a"]})


def other_arrays(folder):
    """The arrays of another checkpoint under this manifest, one of them missing."""
    shutil.rmtree(folder / "arrays")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "arrays", {"00000": jnp.int32(0)})
    reseal(folder)


def other_shape(folder):
    """An array of another shape, which orbax alone would cut to the asked one."""
    shutil.rmtree(folder / "arrays")
    arrays = {f"{index:05d}": leaf for index, leaf in enumerate(jax.tree.leaves(LIKE))}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "arrays", arrays | {"00000": jnp.zeros((5, 4))})
    reseal(folder)


def sealed_without(name):
    def damage(folder):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        reseal(folder)

    return damage


CORRUPT = r"corrupt or truncated, got \d+ changes since it was sealed:\n  "
DAMAGES = {
    "truncated array": (lambda f: truncate(biggest(f)), CORRUPT + "arrays/.*: other bytes"),
    "emptied array": (lambda f: biggest(f).write_bytes(b""), CORRUPT + "arrays/.*: other bytes"),
    "flipped byte": (lambda f: flip(biggest(f)), CORRUPT + "arrays/.*: other bytes"),
    "missing file": (lambda f: biggest(f).unlink(), CORRUPT + "arrays/.*: missing"),
    "extra file": (lambda f: (f / "x.tmp").write_text(""), CORRUPT + "x.tmp: added"),
    "renamed file": (
        lambda f: biggest(f).rename(f / "arrays" / "zz"),
        r"got 2 changes(?s:.*): missing\n(?s:.*)arrays/zz: added",
    ),
    "swapped files": (
        lambda f: swap(biggest(f), f / MANIFEST),
        r"got 2 changes(?s:.*)manifest.json: other bytes",
    ),
    "manifest edited": (
        edit(lambda r: r.update(step=4), sealed=False),
        CORRUPT + "manifest.json: other bytes",
    ),
    "seal missing": (lambda f: (f / SEAL).unlink(), "has no seal, got no sha256.json"),
    "seal truncated": (lambda f: truncate(f / SEAL), CORRUPT + "sha256.json: the seal itself"),
    "seal padded": (
        lambda f: (f / SEAL).write_text((f / SEAL).read_text() + " "),
        CORRUPT + "sha256.json: the seal itself",
    ),
    "seal of another kind": (lambda f: (f / SEAL).write_text("[1]"), CORRUPT + "sha256.json: the"),
    "half a step": (only_half, "has no seal"),
    "a folder for a step, empty": (
        lambda f: (shutil.rmtree(f), f.mkdir()),
        "has no seal, got no sha256.json in it. It is no checkpoint of optlab",
    ),
    "only a half-written step": (unnamed, "no complete checkpoint, got .* with 3.part"),
    "an empty folder": (shutil.rmtree, "no complete checkpoint, got .* with nothing in it"),
    "no folder": (lambda f: shutil.rmtree(f.parent), "no complete checkpoint, .* no such folder"),
    "written by orbax alone": (by_orbax, "has no seal"),
    "manifest missing, sealed": (sealed_without(MANIFEST), "no manifest that can be read"),
    "arrays missing, sealed": (sealed_without("arrays"), "orbax cannot read"),
    "manifest is no record, sealed": (
        lambda f: ((f / MANIFEST).write_text("[]"), reseal(f)),
        "no manifest that can be read, got",
    ),
    "manifest lacks a field, sealed": (edit(lambda r: r.pop("nodes")), "no manifest that can be"),
    "leaf renamed, sealed": (
        set_leaf(0, 0, "params/z"),
        r"params/z: only in the checkpoint, float32\[3, 4\]\n  params/a: only here",
    ),
    "leaf's dtype changed, sealed": (
        set_leaf(0, 1, "int32"),
        r"params/a: int32\[3, 4\] in the checkpoint, float32\[3, 4\] here",
    ),
    "leaf's shape changed, sealed": (
        set_leaf(0, 2, [4, 3]),
        r"params/a: float32\[4, 3\] in the checkpoint, float32\[3, 4\] here",
    ),
    "leaves swapped, sealed": (edit(exchange), "in another order: params/b, params/a"),
    "leaf dropped, sealed": (edit(drop_leaf), r"params/a: only here, float32\[3, 4\]"),
    "other arrays, sealed": (other_arrays, "7 arrays in the manifest, 1 in orbax's files"),
    "array of another shape, sealed": (
        other_shape,
        r"params/a: float32\[3, 4\] in the manifest, float32\[5, 4\] in orbax's files",
    ),
    "config edited, sealed": (
        edit(lambda r: r["config"].update(lr=0.2)),
        "another config than it was saved with, got one that does not match its SHA-256",
    ),
    "another format, sealed": (
        edit(lambda r: r.update(format=2)),
        "another format than this optlab reads, 1, got 2. Read it with optlab 0.1.0",
    ),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_refused(kind, saved):
    damage, says = DAMAGES[kind]
    checkpoint.restore(saved, LIKE, config=CONFIG)
    damage(saved / "3")
    with pytest.raises(checkpoint.CheckpointError, match=says):
        checkpoint.restore(saved, LIKE, config=CONFIG)


@pytest.mark.parametrize("harm", [truncate, flip, lambda path: path.unlink()])
def test_each_file_counts(harm, saved):
    harmed = files(saved)
    assert len(harmed) > 8
    for path in harmed:
        content = path.read_bytes()
        harm(path)
        for act in (checkpoint.read, lambda root: checkpoint.restore(root, LIKE)):
            with pytest.raises(checkpoint.CheckpointError):
                act(saved)
        path.write_bytes(content)
    checkpoint.restore(saved, LIKE)


def test_a_damaged_step_names_the_others(saved):
    checkpoint.save(saved, LIKE, step=5)
    flip(biggest(saved / "5"))
    with pytest.raises(checkpoint.CheckpointError, match=r"Restore another step, there are \[3\]"):
        checkpoint.restore(saved, LIKE)
    checkpoint.restore(saved, LIKE, step=3)


def params(**changed):
    return tree(params=PARAMS | changed)


BELIEF = optax.adabelief(0.1)
OTHERS = {
    "leaf renamed": (
        {"params": {"x": PARAMS["a"], "b": PARAMS["b"], "c": None}, "state": LIKE["state"]},
        r"params/a: only in the checkpoint, float32\[3, 4\]\n  params/x: only here, float32",
    ),
    "leaves swapped": (
        params(a=PARAMS["b"], b=PARAMS["a"]),
        r"params/a: float32\[3, 4\] in the checkpoint, float32\[4\] here",
    ),
    "another dtype": (
        params(b=jnp.ones(4, jnp.bfloat16)),
        r"params/b: float32\[4\] in the checkpoint, bfloat16\[4\] here",
    ),
    "another shape": (params(b=jnp.ones(5)), r"got 3 differences(?s:.*)nu/b: float32\[4\] in"),
    "a leaf more": (params(d=jnp.ones(1)), r"params/d: only here, float32\[1\]"),
    "a leaf less": (
        {"params": {"a": PARAMS["a"], "c": None}, "state": LIKE["state"]},
        r"got 1 differences:\n  params/b: only in the checkpoint, float32\[4\]",
    ),
    "a leaf masked": (params(b=None), r"params/b: only in the checkpoint, float32\[4\]"),
    "another hole": (params(c=optax.MaskedNode()), "params/c: .* in the checkpoint, .*MaskedNode"),
    "another method of the same fields": (
        tree(BELIEF),
        "state/0: .*ScaleByAdamState.* in the checkpoint, .*ScaleByBeliefState.* here",
    ),
    "links in another order": (
        tree(optax.chain(optax.scale(-0.1), optax.scale_by_adam())),
        "state/0/mu/a: only in the checkpoint(?s:.*)state/1/mu/a: only here",
    ),
    "leaves in another order": (
        LIKE | {"params": OrderedDict(b=PARAMS["b"], a=PARAMS["a"], c=None)},
        "got 1 differences:\n  in another order: params/a, params/b",
    ),
    "keys for numbers": (
        params(b=jax.random.split(jax.random.key(0), 4)),
        r"params/b: float32\[4\] in the checkpoint, key<fry>\[4\] here",
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_another_tree_is_refused_with_what_differs(kind, whole):
    like, says = OTHERS[kind]
    with pytest.raises(checkpoint.CheckpointError, match=says) as refused:
        checkpoint.restore(whole, like, config=CONFIG)
    assert "Build `like` by the model and the optimizer" in str(refused.value)
    assert refused.value.differences


CONFIGS = {
    "a value": (CONFIG | {"lr": 0.2}, ["config.lr: 0.1 in the checkpoint, 0.2 here"]),
    "a type": (CONFIG | {"lr": "0.1"}, ['config.lr: 0.1 in the checkpoint, "0.1" here']),
    "nested": (
        CONFIG | {"schedule": {"steps": 11, "warmup": 1}},
        [
            "config.schedule.steps: 10 in the checkpoint, 11 here",
            "config.schedule.warmup: nothing in the checkpoint, 1 here",
        ],
    ),
    "a key less": (
        {"method": "adam", "schedule": {"steps": 10}},
        ["config.lr: 0.1 in the checkpoint, nothing here"],
    ),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_another_config_is_refused_key_by_key(kind, whole):
    config, differences = CONFIGS[kind]
    with pytest.raises(checkpoint.CheckpointError, match="saved with another config") as refused:
        checkpoint.restore(whole, LIKE, config=config)
    assert list(refused.value.differences) == differences
    checkpoint.restore(whole, LIKE)


def test_a_config_where_none_was_saved_is_refused(tmp_path):
    checkpoint.save(tmp_path, LIKE, step=0)
    with pytest.raises(
        checkpoint.CheckpointError, match="config: null in the checkpoint, nothing here"
    ):
        checkpoint.restore(tmp_path, LIKE, config={"lr": 0.1})


def test_what_is_no_array_in_like_is_refused_by_name(whole):
    with pytest.raises(
        checkpoint.CheckpointError, match="leaf 'params/b' must be an array, got a float"
    ):
        checkpoint.restore(whole, LIKE | {"params": PARAMS | {"b": 1.0}})
