"""The macOS workflow is valid, and runs what it says."""

from __future__ import annotations

from pathlib import Path

import yaml
from conftest import REPOSITORY

WORKFLOW = REPOSITORY / ".github/workflows/macos.yml"


def test_the_workflow_runs_what_its_comment_says() -> None:
    """It starts on a push, a pull request and by hand, on Apple silicon. It runs the README's two
    commands, the Metal tests and the self-test, by scripts that exist.
    """
    text = WORKFLOW.read_text()
    workflow = yaml.safe_load(text)
    assert set(workflow[True]) == {"push", "pull_request", "workflow_dispatch"}  # YAML 1.1's `on`
    (job,) = workflow["jobs"].values()
    assert job["runs-on"] == "macos-15"
    commands = [step["run"] for step in job["steps"] if "run" in step]
    assert commands == [
        "./train_dpo_run1.sh --selftest",
        "tests/run.sh -m metal -rs",
        "./train_dpo_run1.sh config/smollm2-135m_demo.yaml",
        "tests/run.sh",
    ]
    words = " ".join(commands).split()
    assert all((REPOSITORY / Path(word)).is_file() for word in words if "/" in word)
    assert "has not run yet" in text
