"""The documents speak of commands, flags, profiles and files that exist; what they let a reader run runs."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import duckdb
import pytest
import typer

from hestctl.cli.app import app
from hestctl.energy import certificate, check
from hestctl.settings import keys, load, profile_names
from hestctl.store.migrations import migrate

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
QUICKSTART = (ROOT / "examples" / "quickstart.sh").read_text(encoding="utf-8")
EXAMPLES = {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "examples").glob("*.md"))}
JOULES = EXAMPLES["joules"]
GUIDES = {name: EXAMPLES[name] for name in ("walkthrough", "own-model-and-data")}
SNIPPET = re.compile(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", flags=re.DOTALL)
"""A Python block, and the output that stands below it, if any does."""


def flags_of(command):
    return {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}


def test_every_command_line_in_the_documents_exists():
    commands = typer.main.get_command(app).commands
    lines = re.findall(r"^\s*hestctl (\w+)([^#\n`]*)", README + "\n" + QUICKSTART, flags=re.MULTILINE)
    lines += re.findall(r"`hestctl (\w+)([^`]*)`", README + JOULES)
    assert len(lines) >= 14
    for name, rest in lines:
        assert name in commands, name
        unknown = set(re.findall(r"--[a-z-]+", rest)) - flags_of(commands[name])
        assert not unknown, (name, unknown)


def command_lines(document):
    """The arguments of every ``hestctl`` line in the document's shell blocks, comments dropped."""
    for block in re.findall(r"```sh\n(.*?)```", document, flags=re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            found = re.match(r"(?:\w+=\S+ )*(?:accelerate launch .*-m )?hestctl (.*)", line)
            if found:
                yield shlex.split(found[1], comments=True)


@pytest.mark.parametrize("name", ["README", *EXAMPLES])
def test_every_command_line_parses(name):
    """Flags, their values and their number; keys and profiles that are there."""
    document = README if name == "README" else EXAMPLES[name]
    group = typer.main.get_command(app)
    lines = list(command_lines(document))
    assert len(lines) >= {"README": 9, "walkthrough": 7, "own-model-and-data": 20}.get(name, 0)
    for arguments in lines:
        command = group.commands[arguments[0]]
        while hasattr(command, "commands"):
            arguments = arguments[1:]
            command = command.commands[arguments[0]]
        given = command.make_context(arguments[0], arguments[1:]).params
        unknown = {pair.partition("=")[0] for pair in given.get("set_") or []} - set(keys())
        assert not unknown, arguments
        profile = given.get("profile", "quickstart")
        assert profile in profile_names() or profile.endswith(".toml"), arguments


def test_walkthrough_has_the_commands_of_the_quickstart_in_their_order():
    told = [arguments[0] for arguments in command_lines(EXAMPLES["walkthrough"])]
    run = re.findall(r"^hestctl (\w+)", QUICKSTART, flags=re.MULTILINE)
    assert told[: len(run)] == run


def test_profiles_that_are_shown_are_profiles(tmp_path):
    shown = re.findall(r"```toml\n(.*?)```", "".join(EXAMPLES.values()), flags=re.DOTALL)
    assert shown
    for place, text in enumerate(shown):
        path = tmp_path / f"{place}.toml"
        path.write_text(text)
        origins = load(str(path), {}, {}).origins
        assert f"profile {path}" in set(origins.values())


@pytest.mark.parametrize("name", EXAMPLES)
def test_links_lead_to_files(name):
    links = re.findall(r"\]\((?!http)([^)#]+)", EXAMPLES[name])
    assert all((ROOT / "examples" / link).is_file() for link in links), links


@pytest.mark.parametrize("document", [README, JOULES, *GUIDES.values()], ids=["README", "joules", *GUIDES])
def test_every_flag_and_key_the_documents_speak_of_exists(document):
    commands = typer.main.get_command(app).commands.values()
    known = set().union(*(flags_of(command) for command in commands)) | {"--debug", "--version", "--help"}
    known |= {"--multi_gpu", "--num_processes"}  # Accelerate's
    for flag in set(re.findall(r"(?<![\w-])--[a-z][a-z_-]+", document)):
        assert flag in known, flag
    for key in set(re.findall(r"--set ([a-z_.]+)=|`(energy\.[a-z_]+)`", document)):
        assert "".join(key) in set(keys()), key


@pytest.mark.parametrize(
    ("code", "output"), SNIPPET.findall(README) + SNIPPET.findall(JOULES), ids=["README", "bound", "traces"]
)
def test_what_the_documents_let_a_reader_run_prints_what_they_say(code, output):
    ran = subprocess.run([sys.executable, "-"], input=code, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    if output:
        assert ran.stdout == output
    else:
        assert re.search(r"\d J (measured|estimated) ", ran.stdout), ran.stdout


def test_joules_names_tests_measures_and_files_that_exist():
    sources = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/**/test_*.py"))
    defined = set(re.findall(r"^def (test_\w+)", sources, flags=re.MULTILINE))
    named = set(re.findall(r"`(test_\w+)`", JOULES))
    assert len(named) >= 7
    assert named <= defined, named - defined
    told = re.findall(r"((?:`\w+`(?:, )?)+) of `calibrate`", JOULES)
    measures = {name for part in told for name in re.findall(r"\w+", part)}
    assert len(measures) >= 6
    assert measures <= {*certificate.MEASURES, *check.MEASURES}
    paths = set(re.findall(r"`((?:hestctl|tests|examples)/[\w/.]+)`", JOULES))
    assert len(paths) >= 3
    assert all((ROOT / path).exists() for path in paths), paths


def test_joules_has_the_word_of_every_column_of_the_store():
    """Nothing in the store says that its predicted joules are: a new column has to be added here."""
    with duckdb.connect() as connection:
        migrate(connection, 0)
        columns = connection.execute("SELECT table_name || '.' || column_name FROM duckdb_columns()")
        joules = {name for (name,) in columns.fetchall() if re.search(r"(?<=[._])j(_|$)", name)}
    table = re.search(r"\| column \| its word \|\n(.*?)\n\n", JOULES, flags=re.DOTALL).group(1)
    words = {}
    for named, word in re.findall(r"^\| (.*?) \| (.*?) \|$", table, flags=re.MULTILINE):
        words |= dict.fromkeys(re.findall(r"`(.*?)`", named), word)
    assert set(words) == joules
    for column, word in words.items():
        is_kind = re.fullmatch(r"`(runs|samples|windows|trials)\.(energy_)?kind`", word)
        assert is_kind or word.startswith("predicted"), (column, word)


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
