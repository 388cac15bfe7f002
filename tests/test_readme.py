"""The README: its code runs, its catalogue is the code's."""

import pathlib
import re

import jax

import optlab
from optlab.lab import catalog

README = pathlib.Path(__file__).parent.parent / "README.md"


def test_every_code_block_runs():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 19
    names = {}
    with jax.numpy_rank_promotion("allow"):  # as a reader's JAX is set
        for block in blocks:
            exec(compile(block, str(README), "exec"), names)


def test_catalogue_is_the_codes():
    text = README.read_text()
    table = re.search(r"<!-- catalogue.*?-->\n(.*?)<!-- end of catalogue -->", text, re.DOTALL)
    assert table.group(1) == catalog.markdown()


def test_every_public_name_is_mentioned():
    text = README.read_text()
    missing = [name for name in optlab.__all__ if not re.search(rf"\b{name}\b", text)]
    assert missing == []
