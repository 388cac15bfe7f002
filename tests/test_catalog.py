"""The catalogue is complete, and what docstrings say of state agrees with it."""

import inspect
import re

import catalog
import optax
import pytest

import optlab
from optlab.testing import checks_for

_ROOMS = tuple(
    f"optlab.{room}." for room in ("transforms", "recipes", "schedules", "combine", "controllers")
)
EVERY = {
    name: value
    for name, value in vars(optlab).items()
    if name in optlab.__all__
    and inspect.isfunction(value)
    and inspect.unwrap(value).__module__.startswith(_ROOMS)
}
_ROWS_FOR = (optax.GradientTransformationExtraArgs, optax.Schedule)
PUBLIC = {n: f for n, f in EVERY.items() if inspect.signature(f).return_annotation in _ROWS_FOR}
# Projectors, rules and handlers: what transformations are made of.
PARTS = EVERY.keys() - PUBLIC.keys()
RECIPES = {n for n, f in PUBLIC.items() if inspect.unwrap(f).__module__.startswith(_ROOMS[1])}
ROWS = {case.name.split("[")[0]: case for case in catalog.CASES}
_PRIMITIVE_SECTIONS = ("Args", "Returns", "Example")
_RECIPE_SECTIONS = ("Args", "Returns", "State", "Raises", "Example", "Deviations", "References")


def _sections(name):
    return re.findall(r"^([A-Z][a-z]+):$", inspect.getdoc(EVERY[name]), re.MULTILINE)


def _section(name, title):
    pattern = rf"^{title}:\n((?:  .*\n|\n)+)"
    found = re.search(pattern, inspect.getdoc(EVERY[name]) + "\n", re.MULTILINE)
    return found.group(1) if found else ""


def test_something_is_public():
    assert len(RECIPES) >= 13
    assert len(PUBLIC) - len(RECIPES) >= 14
    assert len(PARTS) >= 9


def test_every_public_transformation_has_a_row_and_every_row_is_public():
    assert sorted(PUBLIC) == sorted(ROWS)


def test_names_of_rows_are_unique():
    names = [case.name for case in catalog.CASES]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("case", catalog.CASES, ids=lambda case: case.name)
def test_row_states_what_it_hits_and_what_it_stores(case):
    if "schedule" not in case.tags:
        assert {"hits", "state_bytes"} <= case.selectors


@pytest.mark.parametrize("case", catalog.CASES, ids=lambda case: case.name)
def test_optlab_has_no_known_failures(case):
    assert not case.xfail


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_rows_of_recipes_get_the_checks_of_recipes(name):
    assert "nnx_optimizer" in checks_for(ROWS[name].selectors)


@pytest.mark.parametrize("name", sorted(EVERY))
def test_docstring_has_the_sections_in_order(name):
    needed = _RECIPE_SECTIONS if name in RECIPES else _PRIMITIVE_SECTIONS
    found = [section for section in _sections(name) if section in needed]
    assert found == list(needed)


@pytest.mark.parametrize("name", sorted(EVERY))
def test_docstring_names_every_argument(name):
    documented = re.findall(r"^  (\w+):", _section(name, "Args"), re.MULTILINE)
    assert documented == list(inspect.signature(EVERY[name]).parameters)


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_docstring_states_the_bytes_of_the_row(name):
    stated = re.search(r"(\d+)\s+bytes\s+per(\s+float32)?\s+parameter", _section(name, "State"))
    # A wrapper's state is mostly its inner transformation's, which the row chooses.
    if stated and "wrapper" not in ROWS[name].tags:
        assert float(stated.group(1)) == ROWS[name].fact("state_bytes")
