"""Options and fixtures of all tests.

`--golden DIR` and `--tokenizers DIR` point the golden checks at other folders with the same layout.
"""

import os
from pathlib import Path

import pytest

# Before torch starts its threads; programs do the same (stages/core/stage.py).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes on these cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared"


def pytest_addoption(parser):
    shared = "the shared folder beside the checkout"
    parser.addoption(
        "--golden", type=Path, default=None, help=f"golden numbers (default: {shared}, else tests/golden/figures)"
    )
    parser.addoption("--tokenizers", type=Path, default=None, help="folder of real tokenizers, one folder each")


# Run together on one worker, first and in this order: they share a Slurm, or a finished run of the workflow.
SHARING = ("tests/cluster/", "tests/workflow/")
TABLES = ("tests/unit/test_families.py",)  # whose every row can run on a worker of its own


def pytest_collection_modifyitems(items):
    """Put the tests of SHARING first: they take longest."""
    items.sort(key=lambda item: next((n for n, folder in enumerate(SHARING) if folder in item.nodeid), len(SHARING)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Give workers the tests of SHARING by folder, those of TABLES one by one and others by file."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            shared = next((folder for folder in SHARING if nodeid.startswith(folder)), None)
            return shared or (nodeid if nodeid.startswith(TABLES) else nodeid.partition("::")[0])

    return Scheduling(config, log)


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def golden(request) -> Path:
    """The folder of golden numbers: --golden, or the shared folder beside the checkout, or the copied figures."""
    return golden_folder(request.config)


@pytest.fixture(scope="session")
def tokenizers_dir(request) -> Path:
    """The folder of real tokenizers: --tokenizers, or the shared folder beside the checkout."""
    return tokenizers_folder(request.config)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip(f"no data sets: {folder} does not exist")
    return folder


def golden_folder(config) -> Path:
    given = config.getoption("--golden")
    if given is not None:
        if not given.is_dir():
            raise pytest.UsageError(f"--golden {given} is not a folder")
        return given
    shared = SHARED / "golden"
    return shared if shared.is_dir() else REPOSITORY / "tests" / "golden" / "figures"


def golden_file(folder: Path, name: str) -> Path:
    """Return a file or folder of golden numbers; the test is skipped where there is none."""
    if not (folder / name).exists():
        pytest.skip(f"no golden {name} in {folder}: give --golden DIR with it")
    return folder / name


def tokenizers_folder(config) -> Path:
    given = config.getoption("--tokenizers")
    if given is not None:
        if not given.is_dir():
            raise pytest.UsageError(f"--tokenizers {given} is not a folder")
        return given
    folder = SHARED / "tokenizers"
    if not folder.is_dir():
        pytest.skip(f"no real tokenizers: {folder} does not exist; give --tokenizers DIR")
    return folder
