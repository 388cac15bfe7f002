"""What a release rests on: one version, tested bounds, declared imports, pinned actions."""

import ast
import functools
import importlib.metadata
import pathlib
import re
import sys
import tomllib

import pytest

import optlab

ROOT = pathlib.Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()
CITATION = (ROOT / "CITATION.cff").read_text()
WORKFLOWS = {path.name: path.read_text() for path in (ROOT / ".github/workflows").glob("*.yml")}

# What a module comes with, where that is not of its name.
DISTRIBUTIONS = {
    **dict.fromkeys(["jaxlib", "numpy", "scipy"], "jax"),
    **dict.fromkeys(["orbax", "tensorstore"], "orbax-checkpoint"),
    "sklearn": "scikit-learn",
}


def disagreements(version, changelog, citation):
    """What changelog and citation say of a version that does not agree, as sentences."""
    headings = re.findall(r"^## \[(.+?)\](?: - (\d{4}-\d\d-\d\d))?$", changelog, re.MULTILINE)
    fields = dict(re.findall(r"^([a-z-]+): (.+)$", citation, re.MULTILINE))
    released = [(name, date) for name, date in headings if name != "Unreleased"]
    wrong = [f"changelog: {name} has no date" for name, date in released if not date]
    if fields["version"] != version:
        wrong.append(f"citation: version {fields['version']}, not {version}")
    if version not in dict(released):
        if ("Unreleased", "") not in headings:
            wrong.append(f"changelog: neither {version} nor Unreleased")
        if "date-released" in fields:
            wrong.append(f"citation: {version} has a date, and no section in the changelog")
    elif released[0][0] != version:
        wrong.append(f"changelog: {released[0][0]} stands above {version}")
    elif released[0][1] != fields.get("date-released"):
        wrong.append("citation and changelog: not the same date")
    return wrong


def test_the_version_is_one():
    assert importlib.metadata.version("optlab") == optlab.__version__
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["hatch"]["version"]["path"] == "optlab/__init__.py"
    assert disagreements(optlab.__version__, CHANGELOG, CITATION) == []


AHEAD = "## [Unreleased]\n"
DATED = "## [Unreleased]\n## [0.2.0] - 2026-03-01\n## [0.1.0] - 2026-01-31\n"
CITED = "version: 0.2.0\ndate-released: 2026-03-01\n"


@pytest.mark.parametrize(
    ("version", "changelog", "citation", "wrong"),
    [
        ("0.2.0", DATED, CITED, 0),
        ("0.2.0", AHEAD, "version: 0.2.0\n", 0),
        ("0.2.0", AHEAD, CITED, 1),
        ("0.2.0", "", "version: 0.2.0\n", 1),
        ("0.2.0", DATED, "version: 0.2.0\n", 1),
        ("0.2.0", DATED, CITED.replace("03-01", "03-02"), 1),
        ("0.2.0", DATED, CITED.replace("0.2.0", "0.1.0"), 1),
        ("0.1.0", DATED, CITED.replace("0.2.0", "0.1.0"), 1),
        ("0.2.0", DATED.replace(" - 2026-01-31", ""), CITED, 1),
    ],
)
def test_what_disagrees_is_found(version, changelog, citation, wrong):
    assert len(disagreements(version, changelog, citation)) == wrong


def named(requirement):
    """The name that a requirement begins with."""
    return re.match(r"[\w.-]+", requirement)[0]


def declared(*extras):
    """The distributions that optlab with these extras asks for, extras of extras included."""
    project = PROJECT["project"]
    found, asked = set(map(named, project["dependencies"])), list(extras)
    while asked:
        for requirement in project["optional-dependencies"][asked.pop()]:
            if nested := re.match(r"optlab\[(.+)\]", requirement):
                asked += nested[1].split(",")
            else:
                found.add(named(requirement))
    return found


@functools.cache
def imported(path):
    """The distributions that a file imports, at its top or within a function."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    tops = {module.split(".")[0] for module in modules} - sys.stdlib_module_names - {"optlab"}
    return {DISTRIBUTIONS.get(top, top) for top in tops}


@pytest.mark.parametrize(
    ("folder", "extras"),
    [
        (".", ("race", "controllers", "diagnostics")),
        ("lab", ("race",)),
        ("controllers", ("controllers",)),
        ("diagnostics", ("diagnostics",)),
        ("state", ("checkpoint",)),
        ("linalg", ("diagnostics",)),
        ("recipes", ()),
        ("transforms", ()),
        ("distributed", ()),
        ("schedules", ()),
    ],
)
def test_what_is_imported_is_declared(folder, extras):
    files = list((ROOT / "optlab" / folder).rglob("*.py"))
    assert files
    assert set().union(*map(imported, files)) <= declared(*extras)


def test_both_ends_are_tested():
    project = PROJECT["project"]
    pythons = re.findall(r"Python :: (3\.\d+)", "\n".join(project["classifiers"]))
    matrix = re.search(r"python: \[(.+)\]", WORKFLOWS["ci.yml"])[1]
    assert re.findall(r"3\.\d+", matrix) == pythons
    assert project["requires-python"] == f">={pythons[0]}"
    lowest = WORKFLOWS["ci.yml"].split("\n  lowest:\n")[1].split("\n\n")[0]
    assert f'python-version: "{pythons[0]}"' in lowest
    assert '--resolution lowest-direct -e ".[test]"' in lowest


def test_every_requirement_has_a_lower_bound():
    # Without one the lowest resolution would try the first release there ever was.
    groups = PROJECT["project"]["optional-dependencies"].values()
    requirements = [*PROJECT["project"]["dependencies"], *(r for group in groups for r in group)]
    unbounded = [r for r in requirements if not re.search(r">=\d", r)]
    assert all(r.startswith("optlab[") for r in unbounded)


def test_actions_are_pinned_and_one_job_may_publish():
    uses = [
        tuple(use)
        for text in WORKFLOWS.values()
        for use in re.findall(r"uses: ([\w/.-]+)(?:@(\S+) # (v[\d.]+))?$", text, re.MULTILINE)
    ]
    assert len(uses) == sum(text.count("uses: ") for text in WORKFLOWS.values())
    assert all(re.fullmatch("[0-9a-f]{40}", pin) for name, pin, _ in uses if name[0] != ".")
    assert len({name for name, *_ in uses}) == len(set(uses))
    assert sum(text.count("id-token: write") for text in WORKFLOWS.values()) == 1
    assert "secrets." not in "".join(WORKFLOWS.values())


def test_the_sdist_holds_what_tests_read():
    held = {
        path.removeprefix("/")
        for path in PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    }
    needed = {".github", "benchmarks", "notebooks", "optlab", "tests"}
    assert held >= needed | {"CHANGELOG.md", "CITATION.cff", "README.md"}
    assert all((ROOT / path).exists() for path in held)
