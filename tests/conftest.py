"""Eight host devices, strict numerics, and the option that names the golden cases."""

import importlib.metadata
import itertools
import os
import pathlib
import sys

# Programs are the users' up to machine code: to emit that well takes half of the suite's time.
_FLAGS = {
    "xla_force_host_platform_device_count": 8,
    "xla_backend_optimization_level": 0,
}
_JAXLIB = tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:3]))
if _JAXLIB < (0, 11, 1):  # then XLA lost the choice, and dies of the flag
    _FLAGS["xla_cpu_use_fusion_emitters"] = "false"
for _flag, _value in _FLAGS.items():
    if _flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --{_flag}={_value}".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(pathlib.Path(__file__).parent))

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
hypothesis.settings.register_profile("optlab", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("optlab")


_tests = itertools.count(1)


def pytest_runtest_teardown():
    # Every program takes some of the 65,530 regions that a process may map: a worker of 4,000 tests
    # died of it. Of 60 tests it is 4,300 regions, and 700 after this.
    if next(_tests) % 200 == 0:
        jax.clear_caches()


def pytest_addoption(parser):
    parser.addoption(
        "--golden-dir",
        type=pathlib.Path,
        default=pathlib.Path(__file__).parent / "golden",
        help="directory of golden cases to replay (default: tests/golden)",
    )


@pytest.fixture(scope="session")
def golden_dir(request):
    """The directory of golden cases asked for."""
    return request.config.getoption("--golden-dir")


@pytest.fixture
def params():
    """The standard tree of the contract: ranks 0 to 4 under Flax's names."""
    from optlab.testing import default_params

    return default_params()
