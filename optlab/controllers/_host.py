"""What host-side controllers share: how they are saved."""

from collections.abc import Mapping
from typing import Any

import numpy as np


class Resumable:
    """A controller whose memory is a few plain attributes.

    `state_dict()` returns them as JSON can hold them: put it beside the arrays, as in
    `checkpoint.save(folder, tree, step=t, values=controller.state_dict())`. `load_state_dict(d)`
    takes them back into a controller that was built with the same arguments.
    """

    _saved: tuple[str, ...] = ()

    def state_dict(self) -> dict[str, Any]:
        """Return what this controller has learned: numbers, lists of numbers and None."""
        return {key: _plain(getattr(self, key)) for key in self._saved}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned, or refuse what another controller saved."""
        found = sorted(saved) if isinstance(saved, Mapping) else type(saved).__name__
        if found != sorted(self._saved):
            raise ValueError(
                f"{type(self).__name__}: load_state_dict needs the keys {sorted(self._saved)}, "
                f"got {found}. Pass what state_dict() of the same class returned."
            )
        for key, value in saved.items():
            setattr(self, key, list(value) if isinstance(value, (list, tuple)) else value)


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(x) for x in value]
    return value.item() if isinstance(value, np.generic) else value
