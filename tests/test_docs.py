"""The README and the examples speak of commands, flags, profiles and files that exist."""

from __future__ import annotations

import re
from pathlib import Path

import typer

from hestctl.cli.app import app
from hestctl.settings import keys, profile_names

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
QUICKSTART = (ROOT / "examples" / "quickstart.sh").read_text(encoding="utf-8")


def flags_of(command):
    return {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}


def test_every_command_line_in_the_documents_exists():
    commands = typer.main.get_command(app).commands
    lines = re.findall(r"^\s*hestctl (\w+)([^#\n`]*)", README + "\n" + QUICKSTART, flags=re.MULTILINE)
    assert len(lines) >= 9
    for name, rest in lines:
        assert name in commands, name
        unknown = set(re.findall(r"--[a-z-]+", rest)) - flags_of(commands[name])
        assert not unknown, (name, unknown)


def test_every_flag_and_key_the_readme_speaks_of_exists():
    commands = typer.main.get_command(app).commands.values()
    known = set().union(*(flags_of(command) for command in commands)) | {"--debug", "--version", "--help"}
    for flag in set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)):
        assert flag in known, flag
    for key in set(re.findall(r"--set ([a-z_.]+)=", README)):
        assert key in set(keys()), key


def test_every_profile_is_named_and_every_named_one_is_there():
    line = re.search(r"Profiles: (.*?)\. Your own data", README, flags=re.DOTALL).group(1)
    assert sorted(re.findall(r"`([a-z0-9.-]+)`", line)) == profile_names()


def test_the_tree_names_every_room_and_nothing_else():
    tree = re.search(r"## The house\n\n```\n(.*?)```", README, flags=re.DOTALL).group(1)
    named = {entry.rstrip("/") for entry in re.findall(r"^  (\S+)", tree, flags=re.MULTILINE)}
    package = ROOT / "hestctl"
    rooms = {p.name for p in package.iterdir() if p.is_dir() and (p / "__init__.py").is_file()}
    modules = {p.name for p in package.glob("*.py")} - {"__init__.py", "__main__.py"}
    assert named == rooms | modules
    for entry in re.findall(r"^(\w+)/", tree, flags=re.MULTILINE):
        assert (ROOT / entry).is_dir()
