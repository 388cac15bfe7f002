"""The examples of every module run and print what they say."""

import doctest
import importlib
import pkgutil

import pytest

import optlab

MODULES = ["optlab", *(m.name for m in pkgutil.walk_packages(optlab.__path__, "optlab."))]
FINDER = doctest.DocTestFinder(exclude_empty=True)


def _examples(name):
    module = importlib.import_module(name)
    return [test for test in FINDER.find(module, name) if test.examples]


# The command line is run by its own tests; importing it here would only cost its dependencies.
TESTS = [test for name in MODULES if ".lab" not in name for test in _examples(name)]


@pytest.mark.parametrize("test", TESTS, ids=lambda test: test.name)
def test_example_prints_what_it_says(test, capsys):
    failed, attempted = doctest.DocTestRunner().run(test)
    assert attempted
    assert not failed, capsys.readouterr().out


def test_every_public_function_with_arguments_has_an_example():
    tested = {test.name.rsplit(".", 1)[-1] for test in TESTS}
    functions = [name for name in optlab.__all__ if callable(getattr(optlab, name))]
    # A view is shown by the policies that return it.
    assert [name for name in functions if name not in tested | {"MatrixView"}] == []
