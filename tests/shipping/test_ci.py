"""The workflow file of continuous integration: what it runs exists, and a release needs it all."""

import os
import re
from typing import Any

import pytest
import yaml

from .conftest import ROOT

FILE = ROOT / ".github" / "workflows" / "ci.yml"


@pytest.fixture(scope="module")
def workflow() -> dict[Any, Any]:
    told: dict[Any, Any] = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    return told


def _steps(job: dict[str, Any]) -> str:
    return "\n".join(str(step.get("run", step.get("uses"))) for step in job["steps"])


def test_it_runs_on_changes_and_on_tags(workflow: dict[Any, Any]) -> None:
    on = workflow[True]  # YAML 1.1 reads the key `on` as true
    assert set(on) >= {"push", "pull_request"}
    assert on["push"]["tags"] == ["v*"]


def test_checks_run_the_one_command_on_both_pythons(workflow: dict[Any, Any]) -> None:
    check = workflow["jobs"]["check"]
    assert check["strategy"]["matrix"]["python"] == ["3.10", "3.12"]
    assert ".ci/run" in _steps(check)
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_every_job_that_is_needed_is_there(workflow: dict[Any, Any]) -> None:
    jobs = workflow["jobs"]
    for job in jobs.values():
        needs = job.get("needs", [])
        assert {needs} if isinstance(needs, str) else set(needs) <= set(jobs)


@pytest.mark.parametrize("name", ["pypi", "registry"])
def test_nothing_is_published_unchecked_or_untagged(workflow: dict[Any, Any], name: str) -> None:
    job = workflow["jobs"][name]
    assert set(job["needs"]) == {"check", "build"}
    assert "refs/tags/v" in job["if"]


def test_permissions_are_the_least(workflow: dict[Any, Any]) -> None:
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["jobs"]["pypi"]["permissions"] == {"id-token": "write"}
    for name, job in workflow["jobs"].items():
        assert name == "pypi" or "write" not in str(job.get("permissions", ""))


def test_every_script_it_calls_exists(workflow: dict[Any, Any]) -> None:
    told = "\n".join(_steps(job) for job in workflow["jobs"].values())
    scripts = re.findall(r"(?:scripts|\.ci)/\S+", told)
    assert "scripts/make_archive.py" in scripts
    assert all((ROOT / script).is_file() for script in scripts)
