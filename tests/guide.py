"""The pages of the guide: their text, their code, and stand-ins for what is not installed."""

import dataclasses
import pathlib
import re
import sys
import types
from typing import ClassVar

import jax
import optax

ROOT = pathlib.Path(__file__).parent.parent
README, GUIDE = ROOT / "README.md", ROOT / "notebooks" / "README.md"
PAGES = (README, GUIDE)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Levanter's base class of optimizers: what `build` of a subclass may count on."""

    learning_rate: float = 6e-4
    weight_decay: float = 0.1
    registry: ClassVar[dict[str, type]] = {}

    @classmethod
    def register_subclass(cls, name):
        """Return the decorator that enters a class under the name that YAML files use."""
        return lambda subclass: cls.registry.setdefault(name, subclass)

    def lr_scheduler(self, num_train_steps):
        """Return the schedule; Levanter's has more shapes."""
        return optax.linear_schedule(self.learning_rate, 0.0, num_train_steps)

    def build_weight_decay_mask(self):
        """Return a function to a mask that ends, as Levanter's, above the arrays of Haliax."""

        def mask(model):
            decays = lambda path, _: "norm" not in jax.tree_util.keystr(path)  # noqa: E731
            named = lambda x: hasattr(x, "axis_names")  # noqa: E731
            return jax.tree_util.tree_map_with_path(decays, model, is_leaf=named)

        return mask


# A block, or a heading; what looks like a heading within a block is a comment.
_PARTS = re.compile(
    r"^```(?P<language>\w*)\n(?P<code>(?:.*\n)*?)```|^#+ (?P<heading>.*)", re.MULTILINE
)


def sections(page):
    """Yield the blocks of Python of a page: the heading above, the number under it, the code."""
    heading, number = "", 0
    for part in _PARTS.finditer(page.read_text()):
        if part["heading"] is not None:
            heading, number = part["heading"], 0
        elif part["language"] == "python":
            yield heading, number, part["code"]
            number += 1


def run(page, code, monkeypatch):
    """Run a block alone, as a reader's JAX is set, and return its names."""
    optim = types.ModuleType("levanter.optim")
    optim.OptimizerConfig = OptimizerConfig
    for name in ("levanter", "levanter.optim"):
        monkeypatch.setitem(sys.modules, name, optim)
    names = {"__name__": "guide"}
    with jax.numpy_rank_promotion("allow"):
        exec(compile(code, str(page), "exec"), names)
    return names
