"""Shapes of parameters in files: every format gives them back, every broken file is named."""

import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from optlab.lab import shape_files
from optlab.lab.config import BadInput

PARAMS = {
    "attn": {"kernel": np.ones((4, 6), np.float32)},
    "head": {"kernel": jnp.ones((4, 2), jnp.bfloat16)},
}
SHAPES = {"attn/kernel": ((4, 6), "float32"), "head/kernel": ((4, 2), "bfloat16")}


def write_pickle(path, params=PARAMS):
    path.write_bytes(pickle.dumps(params))


def write_npz(path):
    np.savez(
        path, **{"attn.kernel": PARAMS["attn"]["kernel"], "head/kernel": PARAMS["head"]["kernel"]}
    )


def safetensors(tensors):
    header = json.dumps({"__metadata__": {"format": "pt"}, **tensors}).encode()
    return len(header).to_bytes(8, "little") + header


def write_safetensors(path):
    kinds = {"float32": "F32", "bfloat16": "BF16"}
    path.write_bytes(
        safetensors(
            {
                key.replace("/", "."): {
                    "dtype": kinds[dtype],
                    "shape": shape,
                    "data_offsets": [0, 0],
                }
                for key, (shape, dtype) in SHAPES.items()
            }
        )
    )


def write_shards(path):
    path.mkdir()
    for i, key in enumerate(SHAPES):
        shape, dtype = SHAPES[key]
        entry = {"dtype": {"float32": "F32", "bfloat16": "BF16"}[dtype], "shape": shape}
        (path / f"{i}.safetensors").write_bytes(safetensors({key.replace("/", "."): entry}))


def write_orbax(path, params=PARAMS):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, params)


FILES = {
    "arrays.pkl": write_pickle,
    "structs.pickle": lambda path: write_pickle(path, jax.eval_shape(lambda: PARAMS)),
    "params.npz": write_npz,
    "params.safetensors": write_safetensors,
    "shards": write_shards,
    "checkpoint": write_orbax,
}


def found(path, **options):
    params, others = shape_files.read(str(path), **options)
    return {key: (leaf.shape, str(leaf.dtype)) for key, leaf in params.items()}, others


@pytest.mark.parametrize("name", FILES)
def test_every_format_gives_back_paths_shapes_and_dtypes(name, tmp_path):
    FILES[name](tmp_path / name)
    assert found(tmp_path / name) == (SHAPES, 0)


def test_shapes_may_be_tuples(tmp_path):
    write_pickle(tmp_path / "x.pkl", {"layers": [{"kernel": (4, 6), "scale": (4,)}]})
    assert found(tmp_path / "x.pkl", dtype="bfloat16") == (
        {"layers/0/kernel": ((4, 6), "bfloat16"), "layers/0/scale": ((4,), "bfloat16")},
        0,
    )


def test_only_the_subtree_and_only_floats_are_parameters(tmp_path):
    state = {"params": {"w": np.ones((3, 4))}, "opt_state": {"mu": {"w": np.ones((3, 4))}}}
    state["params"]["seen"] = np.int32(7)
    for name, write in (("x.pkl", write_pickle), ("x", write_orbax)):
        write(tmp_path / name, state)
        # NumPy's float64 becomes JAX's float32.
        assert found(tmp_path / name, subtree="params") == ({"w": ((3, 4), "float32")}, 1)


def test_a_step_of_a_checkpoint_manager_is_found(tmp_path):
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(3, args=ocp.args.StandardSave(PARAMS))
        manager.wait_until_finished()
        assert found(tmp_path) == found(tmp_path / "3") == (SHAPES, 0)
        manager.save(4, args=ocp.args.StandardSave(PARAMS))
        manager.wait_until_finished()
    with pytest.raises(BadInput, match=r"must name one orbax checkpoint, got .*3/default, .*4/def"):
        found(tmp_path)


BROKEN = {
    "absent.pkl": (None, r"--file does not exist, got '.*absent.pkl'. Check"),
    "x.txt": (b"", r"--file has an unknown ending, got '.*x.txt'. Give a file that ends in .npz"),
    "x.pkl": (b"\x80not a pickle", r"'.*x.pkl' cannot be read as a pickle, got .*. Write it again"),
    "x.npz": (b"PK\x03\x04", r"'.*x.npz' cannot be read as an .npz archive, got BadZipFile"),
    "x.safetensors": (b"\xff" * 20, r"'.*' cannot be read as a safetensors file, got ValueError"),
    "y.safetensors": (
        safetensors({"w": {}}),
        r"'.*' cannot be read as a safetensors file, got KeyError",
    ),
    "none.pkl": (pickle.dumps({"a": "b"}), r"'.*none.pkl' holds no array of floats, got 1 other"),
}


@pytest.mark.parametrize(("name", "content", "message"), [(k, *v) for k, v in BROKEN.items()])
def test_a_broken_file_is_named_with_the_fix(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=f"memory: {message}"):
        found(tmp_path / name)


def test_an_empty_folder_is_no_checkpoint(tmp_path):
    with pytest.raises(BadInput, match=r"must name one orbax checkpoint, got '.*' with none"):
        found(tmp_path)


def test_a_wrong_subtree_is_told_what_there_is(tmp_path):
    write_pickle(tmp_path / "x.pkl")
    with pytest.raises(
        BadInput, match=r"--subtree finds nothing in '.*', got 'params'. It holds at"
    ):
        found(tmp_path / "x.pkl", subtree="params")
