"""The documents: their code runs unchanged, their links have targets, and they are short."""

from __future__ import annotations

import ast
import json
import re
import shlex
import shutil
import subprocess
import threading
import tomllib
from functools import cache
from pathlib import Path

import pytest
from recipes import BLOCKS, DOCUMENTS, ROOT, SHARED, block, blocks_of, run

import benchmarks.__main__ as benchmarks
from gateway_queue_sync import (
    DEFAULT_MARGIN,
    IDENTIFY_INTERVAL,
    LocalQueue,
    SqliteQueue,
    cli,
    serve,
)

README = ROOT / "README.md"


# --- code -----------------------------------------------------------------------------------------


def test_the_first_example_has_ten_lines_and_runs_by_itself(capfd):
    first = block("python", "def start_shard")
    assert first == next(code for language, code in blocks_of(README) if language == "python")
    assert sum(bool(line.strip()) for line in first.splitlines()) <= 10
    before = set(threading.enumerate())
    exec(first.replace("LocalQueue()", "LocalQueue(interval=0.01, margin=0.01)"), {})
    for thread in set(threading.enumerate()) - before:
        thread.join(20)
    assert sorted(
        re.findall(r"^shard (\d) may identify", capfd.readouterr().out, re.MULTILINE)
    ) == [*"012"]


def test_the_bot_starts_its_shards(monkeypatch):
    sent, ran = [], threading.Semaphore(0)

    class WebSocket:
        def send(self, payload):
            sent.append(payload)

        def run(self):
            ran.release()

    code = block("python", "def run_shard").replace(
        "LocalQueue()", "LocalQueue(interval=0.01, margin=0.01)"
    )
    exec(code, {"connect": lambda shard_id: WebSocket(), "identify": lambda shard_id: shard_id})
    for _ in range(4):
        assert ran.acquire(timeout=20)
    assert sorted(sent) == [0, 1, 2, 3]


COMMANDS = [code for language, code in BLOCKS if language in {"sh", "ini"}]
COMMANDS += [
    " ".join(json.loads(words))
    for language, code in BLOCKS
    if language == "dockerfile"
    for words in re.findall(r"^CMD (.*)$", code, re.MULTILINE)
]


def arguments_of(module):
    """What is given to a module of ours, by each of the commands that run it."""
    runs = re.compile(rf"python3? -m {module}\b(.*?)(?:&&|$)", re.MULTILINE)
    return [shlex.split(found) for code in COMMANDS for found in runs.findall(code)]


@pytest.mark.parametrize("arguments", arguments_of("gateway_queue_sync"), ids=" ".join)
def test_the_options_of_a_command_are_there(arguments):
    assert cli.make_parser().parse_args(arguments).func


@pytest.mark.parametrize("arguments", arguments_of("benchmarks"), ids=" ".join)
def test_the_options_of_the_benchmarks_are_there(arguments):
    assert benchmarks.make_parser().parse_args(arguments)


def test_the_first_commands_need_nothing_installed():
    first, second = [code for language, code in blocks_of(README) if language == "sh"][:2]
    assert first == "python3 -m gateway_queue_sync demo\n"
    assert shlex.split(second)[:4] == ["python3", "-m", "venv", ".venv"]


def test_the_shared_queue_grants_and_can_be_looked_at(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    code = block("python", "SqliteQueue(").replace(
        "reserve=50", "reserve=50, interval=0.01, margin=0.02"
    )
    said = re.search(r"a new file grants its first permit after ([\d.]+) s", code)
    assert float(said[1]) == IDENTIFY_INTERVAL + DEFAULT_MARGIN
    names = {}
    exec(code, names)
    names["queue"].close()
    assert capsys.readouterr().out.startswith("<Permit shard_id=7 bucket=0 ")
    command = shlex.split(block("sh", "status --sqlite"))
    assert command[:3] == ["python3", "-m", "gateway_queue_sync"]
    assert command.pop() == "--watch"
    assert cli.main(command[3:]) == 0
    assert "left today  999 of 1000" in capsys.readouterr().out
    command = shlex.split(block("sh", "limit --sqlite"))
    assert cli.main([*command[3:], "--yes"]) == 0
    assert "done: 500 of 1000" in capsys.readouterr().out
    assert Path("identify.sqlite3-journal").stat().st_size == 0
    assert "an empty file `identify.sqlite3-journal`" in README.read_text()


def test_the_remote_queue_asks_its_broker(tmp_path, capsys):
    with SqliteQueue(tmp_path / "q", interval=0.01, margin=0.02) as queue:
        with serve(queue, port=0) as broker:
            changes = {
                "http://127.0.0.1:8787": broker.url,
                '")\nwith': '", interval=0.01, margin=0.02)\nwith',
            }
            run("HttpQueue(", changes=changes)["queue"].close()
    assert capsys.readouterr().out.startswith("<Permit shard_id=7 bucket=0 ")


def test_the_plan_is_what_the_comment_says(capsys):
    run("plan_start(")
    said = block("python", "plan_start(").split("print(plan)  # ")[1]
    assert capsys.readouterr().out == said


def test_the_command_for_a_plan_draws_it(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(shlex.split(block("sh", "plan --shards"))[3:]) == 1
    assert Path("start.svg").read_text().startswith("<svg ")


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl here")
def test_the_command_for_curl_gets_a_permit():
    with LocalQueue() as queue, serve(queue, port=0) as broker:
        command = block("sh", "curl").replace("http://127.0.0.1:8787", broker.url)
        done = subprocess.run(shlex.split(command), capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {"message": "You're free to connect now! :)"}


def blocks_named_in(path):
    """The language of each block that a file of tests runs, and the text that it is found by."""
    code = path.read_text()
    if "recipes" not in code and path.name != "recipes.py":
        return
    tree = ast.parse(code)
    ours = {"run", "block"} if path.name == "recipes.py" else set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "recipes":
            ours |= {alias.name for alias in node.names}
    for node in ast.walk(tree):
        match node:
            case ast.Call(ast.Name("run"), [ast.Constant(text), *_]) if "run" in ours:
                yield "python", text
            case ast.Call(ast.Attribute(ast.Name("recipes"), "run"), [ast.Constant(text), *_]):
                yield "python", text
            case ast.Call(ast.Name("block"), [ast.Constant(language), ast.Constant(text)]) if (
                "block" in ours
            ):
                yield language, text
            case ast.Call(
                ast.Attribute(ast.Name("recipes"), "block"),
                [ast.Constant(language), ast.Constant(text)],
            ):
                yield language, text


@cache
def blocks_named():
    named = [one for path in Path(__file__).parent.glob("*.py") for one in blocks_named_in(path)]
    return named + [("python", text) for text, *_ in SHARED.values()]


CODE = [one for one in BLOCKS if one[0] in {"python", "js"}]


@pytest.mark.parametrize(("language", "code"), CODE, ids=[code.split("\n")[0] for _, code in CODE])
def test_each_block_of_code_is_named_by_a_test_that_runs_it(language, code):
    assert any(named == language and text in code for named, text in blocks_named())


# --- text -----------------------------------------------------------------------------------------

WITH_NAMES = [pytest.param(path, id=str(path.relative_to(ROOT))) for path in DOCUMENTS]


def test_the_readme_has_1500_words_at_most():
    assert len(README.read_text().split()) <= 1500


def anchors(document):
    """What its headings are called in links."""
    prose = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall("^#+ (.*)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", WITH_NAMES)
def test_each_link_leads_somewhere_in_a_clone(document):
    links = re.findall(r"\]\(([^)\s]+)\)", document.read_text())
    for link in links:
        path, _, anchor = link.partition("#")
        if not link.startswith("https://"):
            target = (document.parent / path).resolve() if path else document
            assert target.is_file(), link
            assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("document", WITH_NAMES)
def test_pictures_are_in_the_clone_too(document):
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]*)\)|<img", document.read_text())
    assert all(picture and not picture.startswith("http") for picture in pictures)


def test_every_section_of_the_readme_is_in_its_table_of_contents():
    listed = re.findall(r"\]\(#([^)]*)\)", README.read_text())
    assert set(listed) == anchors(README) - {"gateway-queue-sync"}


@pytest.mark.parametrize("document", WITH_NAMES[1:])
def test_each_document_is_packed(document):
    """In the wheel if it is in the package, and in the source distribution in any case."""
    package = ROOT / "gateway_queue_sync"
    if document.is_relative_to(package):
        settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
        globs = settings["tool"]["setuptools"]["package-data"]["gateway_queue_sync"]
        assert any(document in package.glob(glob) for glob in globs)
    else:
        assert f"graft {document.parent.relative_to(ROOT)}" in (ROOT / "MANIFEST.in").read_text()


@pytest.mark.parametrize("folder", ["", "ledgers/shared"])
def test_the_table_of_files_is_complete(folder):
    package = ROOT / "gateway_queue_sync"
    document = package / ("ledgers" if folder else "") / "README.md"
    files = {path.name for path in (package / folder).glob("*.py")} - {"__init__.py", "__main__.py"}
    rows = [line for line in document.read_text().splitlines() if line.startswith("| `")]
    listed = {name for row in rows for name in re.findall(r"`(\w+\.py)`", row.split("|")[1])}
    assert listed == files


def test_the_readmes_figures_are_among_those_of_the_benchmarks():
    def figures(document):
        text = document.read_text()
        lines = text[text.index("| one permit each 50 ms |") :].split("\n\n")[0].splitlines()
        head, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
        return {(row[0], name): cell for row in rows for name, cell in zip(head, row, strict=True)}

    assert figures(README).items() <= figures(ROOT / "benchmarks" / "README.md").items()
