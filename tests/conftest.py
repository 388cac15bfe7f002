"""Eight host devices, strict numerics, and the option that names the golden cases."""

import os
import pathlib
import sys
import tempfile

# Programs are the users' up to machine code. To emit that well takes most of the suite's time, and
# half of what is left goes into programs that another test has compiled already.
_FLAGS = {
    "xla_force_host_platform_device_count": 8,
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": "false",
}
for _flag, _value in _FLAGS.items():
    if _flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --{_flag}={_value}".strip()
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _programs = tempfile.TemporaryDirectory()  # of the first process; workers find it named
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _programs.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(pathlib.Path(__file__).parent))

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
hypothesis.settings.register_profile("optlab", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("optlab")


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
