"""ComfyUI's real frontend for tests: skipped where the machine has no browser for it."""

from collections.abc import Callable
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def make_workflows(script: Callable[[str], ModuleType]) -> ModuleType:
    """scripts/make_workflows.py, with `frontend` beside it; nothing is ever downloaded."""
    if (reason := script("frontend").missing()) is not None:
        pytest.skip(reason)
    script("workflow_parts")
    script("workflow_graphs")
    return script("make_workflows")
