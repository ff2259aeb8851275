"""The README tells the truth: its commands exist, its Python runs, its YAML loads."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import yaml

from tests.support import system as support

README = (support.ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_python_example_runs_without_a_cluster_a_key_or_a_network(tmp_path: Path) -> None:
    (example,) = blocks("python")
    ran = subprocess.run(
        [sys.executable, "-c", example],
        env=support.environment(tmp_path),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert ran.returncode == 0, ran.stderr
    assert "(3, 256)" in ran.stdout


def test_the_configuration_example_is_valid(tmp_path: Path) -> None:
    from forebay import config

    (example,) = blocks("yaml")
    path = tmp_path / "forebay.yaml"
    path.write_text(example)
    loaded = config.load(path, {"OPENAI_API_KEY": "x", "ANTHROPIC_API_KEY": "y"})

    assert loaded.gateway.max_retries == yaml.safe_load(example)["gateway"]["max_retries"]


def test_two_commands_are_all_and_ci_runs_the_second() -> None:
    first, second, _ = blocks("sh")
    ci = (support.ROOT / ".ci/run").read_text()

    assert first.count("\n") == 1
    assert second.count("\n") == 1
    assert second.strip() in ci
    assert os.access(support.ROOT / "scripts/setup", os.X_OK)


def test_every_file_the_readme_names_exists() -> None:
    for path in re.findall(r"`((?:forebay|actors|deployments|tests|docs)/[\w./]*)`", README):
        assert (support.ROOT / path).exists(), path


def test_no_list_names_an_index_and_no_lock_file_is_kept() -> None:
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=support.ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()

    assert not {"uv.lock", "poetry.lock"} & set(tracked)
    for name in ("requirements.txt", "requirements-dev.txt"):
        text = (support.ROOT / name).read_text()
        assert "--hash=sha256:" in text
        assert "://" not in text
        assert re.search(r"^litellm==1\.106\.\d+ ", text, re.MULTILINE)
        assert re.search(r"^ray==2\.60\.\d+ ", text, re.MULTILINE)
