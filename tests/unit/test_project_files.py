"""The files around the code say the same things: the version, and what a change must pass."""

import ast
import tomllib
from pathlib import Path

import yaml

import cineray
from cineray.jobs.cli.main import main

REPOSITORY = Path(__file__).resolve().parents[2]


def commands_in(path):
    """The lines of a shell script that run something of this project."""
    return [line for line in path.read_text().splitlines() if line.startswith((".venv/", "scripts/"))]


def tool_of(command):
    """Without options and files: `.venv/bin/ruff check --force-exclude` is `.venv/bin/ruff check`."""
    return " ".join(word for word in command.split() if not word.startswith(("-", ".")) or word.startswith(".venv/"))


def test_the_version_stands_in_one_place_that_is_read_without_importing_it(capsys):
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    assert "version" not in project["project"]
    assert project["project"]["dynamic"] == ["version"]
    module, name = project["tool"]["setuptools"]["dynamic"]["version"]["attr"].rsplit(".", 1)
    source = ast.parse((REPOSITORY / "src" / module / "__init__.py").read_text())
    (value,) = (
        node.value
        for node in source.body
        if isinstance(node, ast.Assign) and [ast.unparse(t) for t in node.targets] == [name]
    )
    assert ast.literal_eval(value) == cineray.__version__
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"cineray {cineray.__version__}\n"


def test_hooks_before_a_commit_run_the_tools_of_the_check():
    hooks = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())["repos"]
    entries = [hook["entry"] for repo in hooks for hook in repo["hooks"]]
    tools = {tool_of(command) for command in commands_in(REPOSITORY / "scripts" / "check")}
    assert {tool_of(entry) for entry in entries} == tools - {"scripts/setup", ".venv/bin/pyright"}
    assert not [repo for repo in hooks if repo["repo"] != "local"]  # so the versions are those of constraints.txt


def test_the_workflow_runs_what_the_ci_runs():
    workflow = yaml.safe_load((REPOSITORY / ".github" / "workflows" / "check.yml").read_text())
    steps = [step["run"] for step in workflow["jobs"]["check"]["steps"] if "run" in step]
    assert steps == commands_in(REPOSITORY / ".ci" / "run")
    assert steps[0] == "scripts/check"
