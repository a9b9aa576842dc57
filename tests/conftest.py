"""What every test shares: sizes, markers, and a world without network or a user's caches."""

import os
import sys
import tempfile
from collections.abc import Iterator

import pytest
from hypothesis import settings

FULL = os.environ.get("TERCET_TEST_SIZE", "small") == "full"
ROOMS = ("core_proc", "frontend", "ipc", "ops", "worker_proc")

settings.register_profile("small", max_examples=50, deadline=None)
settings.register_profile("full", max_examples=2_000, deadline=None)
settings.load_profile("full" if FULL else "small")


def pytest_configure(config: pytest.Config) -> None:
    size = os.environ.get("TERCET_TEST_SIZE", "small")
    if size not in ("small", "full"):
        raise pytest.UsageError(f"TERCET_TEST_SIZE must be 'small' or 'full'; got {size!r}")
    os.environ["HF_HUB_OFFLINE"] = "1"  # no test may depend on a network
    if "TERCET_CACHE_ROOT" not in os.environ:
        cache = tempfile.TemporaryDirectory(prefix="tercet-test-cache-")
        config.add_cleanup(cache.cleanup)
        os.environ["TERCET_CACHE_ROOT"] = cache.name  # inherited by every process that the tests start


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_items:
        import torch

        if not torch.cuda.is_available():
            for item in gpu_items:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    if not FULL:
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="runs at full size only: TERCET_TEST_SIZE=full"))


@pytest.fixture(scope="session")
def full_size() -> bool:
    """Whether to run at the sizes of `make verify` rather than at those of `make test`."""
    return FULL


@pytest.fixture(scope="session", autouse=True)
def _rooms_are_loaded_only_inside_the_package() -> Iterator[None]:
    """A room imported as `ipc` rather than `tercet.ipc` would be a second copy, with classes of its own."""
    yield
    assert not [name for name in sys.modules if name.split(".")[0] in ROOMS]
