"""The `forebay` command as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import system as support


def forebay(
    *arguments: str, data_dir: Path, timeout_s: float = 60
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "forebay", *arguments],
        env=support.environment(data_dir),
        cwd=support.ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def test_status_models_health_and_ask(up: support.UpProcess) -> None:
    status = forebay("status", "--json", data_dir=up.data_dir)
    models = forebay("models", data_dir=up.data_dir)
    health = forebay("health", "--json", data_dir=up.data_dir)
    answer = forebay("ask", "Say hello", "--model", "sim", data_dir=up.data_dir)
    stream = forebay("ask", "Say hello", "--model", "sim", "--stream", data_dir=up.data_dir)

    assert json.loads(status.stdout)["ready"]
    assert "local-chat" in models.stdout.split()
    assert json.loads(health.stdout)["status"] in ("healthy", "degraded")
    assert answer.returncode == 0
    assert answer.stdout.strip()
    assert answer.stdout == stream.stdout


def test_ask_says_what_is_wrong(up: support.UpProcess) -> None:
    wrong = forebay("ask", "hi", "--model", "gpt-17", data_dir=up.data_dir)

    assert wrong.returncode == 1
    assert "local-chat" in wrong.stderr
    assert "Traceback" not in wrong.stderr


def test_a_second_up_with_the_same_data_is_refused(up: support.UpProcess) -> None:
    second = forebay("up", "--port", str(support.free_port()), data_dir=up.data_dir)

    assert second.returncode == 2
    assert "runs already" in second.stderr


def test_a_taken_port_is_one_line(up: support.UpProcess, tmp_path: Path) -> None:
    port = up.url.rpartition(":")[2]
    taken = forebay("up", "--port", port, data_dir=tmp_path)

    assert taken.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}" in taken.stderr
    assert len(taken.stderr.strip().splitlines()) == 1


def test_a_public_address_without_keys_is_refused(tmp_path: Path) -> None:
    public = forebay("up", "--host", "0.0.0.0", data_dir=tmp_path)

    assert public.returncode == 2
    assert "no tenant has a key" in public.stderr


def test_a_ray_that_cannot_be_reached_is_one_line(tmp_path: Path) -> None:
    away = forebay(
        "up", "--address", "127.0.0.1:9", "--port", str(support.free_port()),
        data_dir=tmp_path, timeout_s=120,
    )  # fmt: skip

    assert away.returncode in (1, 2)
    assert "Ray cannot be reached at 127.0.0.1:9" in away.stderr
    assert "Traceback" not in away.stderr


def test_config_check_names_file_line_field_and_the_nearest_name(tmp_path: Path) -> None:
    path = tmp_path / "forebay.yaml"
    path.write_text("gateway:\n  timeout: 60\n  max_retrys: 2\n")
    found = forebay("config", "check", str(path), data_dir=tmp_path)

    assert found.returncode == 2
    assert f"{path}:3" in found.stdout
    assert "max_retrys" in found.stdout
    assert "max_retries" in found.stdout


def test_config_show_hides_secrets(tmp_path: Path) -> None:
    path = tmp_path / "forebay.yaml"
    path.write_text(
        "model_list:\n  - model_name: m\n    litellm_params:\n"
        "      {model: openai/m, api_key: sk-very-secret-value}\n"
    )
    shown = forebay("config", "show", "--config", str(path), data_dir=tmp_path)

    assert shown.returncode == 0
    assert "openai/m" in shown.stdout
    assert "very-secret" not in shown.stdout + shown.stderr


def test_config_schema_is_a_json_schema(tmp_path: Path) -> None:
    schema = json.loads(forebay("config", "schema", data_dir=tmp_path).stdout)

    assert "model_list" in json.dumps(schema)


def test_nothing_runs_is_said_so(tmp_path: Path) -> None:
    for command in ("status", "down"):
        nothing = forebay(command, data_dir=tmp_path)
        assert nothing.returncode == 1
        assert "nothing runs" in nothing.stderr


@pytest.mark.parametrize("arguments", [(), ("no-such-command",), ("up", "--no-such-flag")])
def test_bad_usage_is_exit_code_2(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    assert forebay(*arguments, data_dir=tmp_path).returncode == 2
