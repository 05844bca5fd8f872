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
from hestctl.errors import Exit, HestError
from hestctl.settings import keys, load, profile_names
from hestctl.store.migrations import migrate

ROOT = Path(__file__).parent.parent
WRITTEN = [ROOT / "README.md", *sorted((ROOT / "examples").glob("*.md")), ROOT / "examples/study/README.md"]
PAGES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in WRITTEN}
"""Every page by its path; the study's report is made by ``compare`` and held to its own tests."""
README, JOULES = PAGES["README.md"], PAGES["examples/joules.md"]
QUICKSTART = (ROOT / "examples" / "quickstart.sh").read_text(encoding="utf-8")
COMMANDS = typer.main.get_command(app).commands
BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^ *```", flags=re.DOTALL | re.MULTILINE)
SNIPPET = re.compile(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", flags=re.DOTALL)
"""A Python block, and the output that stands below it, if any does."""


def blocks(page, language):
    return [body for _, found, body in BLOCK.findall(page) if found == language]


def prose(page):
    return BLOCK.sub("", page)


def spans(page):
    """What stands between backquotes, on one line or two."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]


def command_lines(page):
    """The arguments of every ``hestctl`` line in the page's shell blocks and between backquotes."""
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            found = re.match(r"\s*(?:\w+=\S+ )*(?:accelerate launch .*-m )?hestctl (.*)", line)
            if found:
                yield shlex.split(found[1], comments=True)
    yield from (shlex.split(span)[1:] for span in spans(page) if span.startswith("hestctl "))


def subcommands(path=(), group=None):
    """Every command by its words, such as ``("runs", "list")``."""
    for name, command in (group or COMMANDS).items():
        if hasattr(command, "commands"):
            yield from subcommands((*path, name), command.commands)
        else:
            yield (*path, name), command


def flags_of(command):
    return {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}


def assert_parses(arguments):
    """Flags, their values and their number; keys and their values; profiles that are there."""
    command = COMMANDS[arguments[0]]
    while hasattr(command, "commands"):
        arguments = arguments[1:]
        command = command.commands[arguments[0]]
    given = command.make_context(arguments[0], list(arguments[1:])).params
    profile = given.get("profile") or "quickstart"
    assert profile in profile_names() or profile.endswith(".toml"), arguments
    assigned = dict(pair.split("=", 1) for pair in given.get("set_") or [])
    load("quickstart" if profile.endswith(".toml") else profile, assigned)


@pytest.mark.parametrize("name", PAGES)
def test_every_command_line_parses(name):
    lines = list(command_lines(PAGES[name]))
    fewest = {"README.md": 2, "examples/walkthrough.md": 9, "examples/own-model-and-data.md": 25}
    assert len(lines) >= fewest.get(name, 0)
    for arguments in lines:
        assert_parses(arguments)


@pytest.mark.parametrize(
    "wrong",
    [
        "profile --emax-ratio 0.6",
        "compare --profile quickstart",
        "train --epochs many",
        "train --set train.epoch=1",
        "train --set budget.envelope=wide",
        "train --profile nowhere",
        "runs show",
    ],
)
def test_a_command_line_that_is_wrong_is_found(wrong):
    page = f"```sh\nhestctl {wrong}\n```\n"
    (arguments,) = command_lines(page)
    with pytest.raises((typer.TyperException, HestError, AssertionError)):
        assert_parses(arguments)


def test_command_lines_are_found_wherever_they_stand():
    page = "```sh\nA=1 hestctl env --json   # why\n```\nand `hestctl\nruns verify`.\n"
    assert list(command_lines(page)) == [["env", "--json"], ["runs", "verify"]]


@pytest.mark.parametrize("name", PAGES)
def test_every_flag_beside_a_command_is_one_of_it(name):
    """``train --dry-run`` between backquotes, without ``hestctl`` and perhaps without the flag's value."""
    commands = {" ".join(words): flags_of(command) for words, command in subcommands()}
    for span in spans(PAGES[name]):
        words = next((words for words in commands if span.startswith(f"{words} -")), None)
        if words:
            unknown = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", span)) - commands[words]
            assert not unknown, (span, unknown)


@pytest.mark.parametrize("name", PAGES)
def test_every_flag_and_key_the_documents_speak_of_exists(name):
    page = PAGES[name]
    known = set().union(*(flags_of(command) for _, command in subcommands()))
    known |= {"--debug", "--version", "--help"}
    known |= {"--multi_gpu", "--num_processes", "--index-url"}  # Accelerate's and pip's
    for flag in set(re.findall(r"(?<![\w-])--[a-z][a-z_-]+", page)):
        assert flag in known, flag
    sections = "|".join({key.partition(".")[0] for key in keys() if "." in key})
    named = set(re.findall(r"--set ([a-z_.]+)=", page))
    named |= set(re.findall(rf"`((?:{sections})\.[a-z_]+)(?:=[^`]*)?`", prose(page)))
    named |= {key.lower().replace("__", ".") for key in re.findall(r"HESTCTL_(\w+__\w+)", page)}
    assert named <= set(keys()), named - set(keys())


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_to_files_and_headings(name):
    folder = (ROOT / name).parent
    for link in re.findall(r"\]\((?!http)([^)]+)\)", PAGES[name]):
        path, _, anchor = link.partition("#")
        target = folder / path if path else ROOT / name
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)", target.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings}, (
                link
            )


def test_every_page_is_linked_from_the_readme():
    linked = {link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", README)}
    assert set(PAGES) - {"README.md"} <= linked


@pytest.mark.parametrize("name", PAGES)
def test_scripts_and_folders_the_pages_let_a_reader_run_exist(name):
    for block in blocks(PAGES[name], "sh"):
        assert subprocess.run(["sh", "-n"], input=block, text=True, check=False).returncode == 0, block
    text = PAGES[name]
    for path in re.findall(r"(?:\bsh|\bpython|\bpytest|--db) ((?:tests|examples)/[\w/.-]+)", text):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("name", PAGES)
def test_prose_fits_a_terminal(name):
    long = [line for line in prose(PAGES[name]).splitlines() if len(line) > 112 and not line.startswith("|")]
    assert not long, long


def test_walkthrough_has_the_commands_of_the_quickstart_in_their_order():
    told = [arguments[0] for arguments in command_lines(PAGES["examples/walkthrough.md"])]
    run = re.findall(r"^hestctl (\w+)", QUICKSTART, flags=re.MULTILINE)
    assert told[: len(run)] == run
    for line in re.findall(r"^hestctl ([^#\n]*)", QUICKSTART, flags=re.MULTILINE):
        filled = line.replace('"$db"', "runs.duckdb").replace('"${HESTCTL_PROFILE__SEQ_LEN:-512}"', "512")
        assert_parses(shlex.split(filled))


def test_profiles_that_are_shown_are_profiles(tmp_path):
    shown = [block for page in PAGES.values() for block in blocks(page, "toml")]
    assert shown
    for place, text in enumerate(shown):
        path = tmp_path / f"{place}.toml"
        path.write_text(text)
        origins = load(str(path), {}, {}).origins
        assert f"profile {path}" in set(origins.values())


def test_readme_is_read_in_five_minutes():
    assert len(README.split()) <= 1_600


def test_readme_has_two_commands_for_a_bare_machine():
    """One runs the main job and leaves ``hestctl`` on the PATH, one passes the tests; each is one block."""
    found = [block for block in blocks(README, "sh") if block.startswith("python3 -m venv .venv && ")]
    (main,) = [block for block in found if "sh examples/quickstart.sh" in block]
    (tests,) = [block for block in found if "pytest" in block]
    assert f"<!-- test-command -->\n```sh\n{tests}" in README  # .ci/run takes it from there
    assert ". .venv/bin/activate &&" in main
    assert "PATH=" not in main
    for block in (main, tests):
        assert "pip install" in block
        chained = block.replace("&&\n", "&& ").strip()
        assert "\n" not in chained  # a step that fails ends the block


def test_readme_says_of_each_command_what_is_so():
    table = re.search(r"\| command \| what it does \|\n(.*?)\n\n", README, flags=re.DOTALL).group(1)
    assert re.findall(r"^\| `(\w+)`", table, flags=re.MULTILINE) == [
        *("calibrate", "train", "harden", "profile", "compare", "runs", "env")
    ]
    assert {"calibrate", "train", "harden", "profile", "compare", "runs", "env"} == set(COMMANDS)
    text = " ".join(README.split())
    with_profile = [words[0] for words, command in subcommands() if "--profile" in flags_of(command)]
    assert set(with_profile) == {"calibrate", "train", "profile", "env"}
    assert "`calibrate`, `train`, `profile` and `env` start from a profile" in text
    without = [" ".join(words) for words, command in subcommands() if "--json" not in flags_of(command)]
    (named,) = re.findall(r"\(every command except `([^`]*)`\)", text)
    assert without == [named]
    told = re.search(r"Exit codes: (.*?)\. The same", text).group(1)
    assert [int(code) for code in re.findall(r"(?:^|; )(\d+) ", told)] == sorted(Exit)


@pytest.mark.parametrize(("code", "output"), SNIPPET.findall(JOULES), ids=["meter", "bound", "traces"])
def test_what_the_documents_let_a_reader_run_prints_what_they_say(code, output):
    ran = subprocess.run([sys.executable, "-"], input=code, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    if output:
        assert ran.stdout == output
    else:
        assert re.search(r"\d J (measured|estimated) ", ran.stdout), ran.stdout


def test_python_stands_only_where_it_is_run():
    assert [name for name, page in PAGES.items() if blocks(page, "python")] == ["examples/joules.md"]


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


def test_joules_has_the_kind_of_every_column_of_the_store():
    """Nothing in the store says that its predicted joules are: a new column has to be added here."""
    with duckdb.connect() as connection:
        migrate(connection, 0)
        columns = connection.execute("SELECT table_name || '.' || column_name FROM duckdb_columns()")
        joules = {name for (name,) in columns.fetchall() if re.search(r"(?<=[._])j(_|$)", name)}
    table = re.search(r"\| column \| kind \|\n(.*?)\n\n", JOULES, flags=re.DOTALL).group(1)
    kinds = {}
    for named, kind in re.findall(r"^\| (.*?) \| (.*?) \|$", table, flags=re.MULTILINE):
        kinds |= dict.fromkeys(re.findall(r"`(.*?)`", named), kind)
    assert set(kinds) == joules
    for column, kind in kinds.items():
        is_column = re.fullmatch(r"`(runs|samples|windows|trials)\.(energy_)?kind`", kind)
        assert is_column or kind.startswith("predicted"), (column, kind)


def test_every_profile_is_named_and_every_named_one_is_there():
    line = re.search(r"Profiles: (.*?)\.\n\n", README, flags=re.DOTALL).group(1)
    assert sorted(re.findall(r"`([a-z0-9.-]+)`", line)) == profile_names()


def test_the_source_layout_names_every_package_and_nothing_else():
    tree = re.search(r"## Source layout\n\n```\n(.*?)```", README, flags=re.DOTALL).group(1)
    named = {entry.rstrip("/") for entry in re.findall(r"^  (\S+)", tree, flags=re.MULTILINE)}
    package = ROOT / "hestctl"
    packages = {p.name for p in package.iterdir() if p.is_dir() and (p / "__init__.py").is_file()}
    modules = {p.name for p in package.glob("*.py")} - {"__init__.py", "__main__.py"}
    assert named == packages | modules
    for entry in re.findall(r"^(\w+)/", tree, flags=re.MULTILINE):
        assert (ROOT / entry).is_dir()
