"""The README's code is run as it stands there, so that none of it can rot."""

from __future__ import annotations

import ast
import json
import re
import shlex
import threading
from pathlib import Path

import pytest
from recipes import BLOCKS, README, SHARED, block, run

import benchmarks.__main__ as benchmarks
import gateway_queue_sync
from gateway_queue_sync import (
    SqliteQueue,
    cli,
    serve,
)


def test_the_bot_in_ten_lines_starts_its_shards(monkeypatch):
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
    first, second = [code for language, code in BLOCKS if language == "sh"][:2]
    assert first == "python3 -m gateway_queue_sync demo\n"
    assert shlex.split(second)[:4] == ["python3", "-m", "venv", ".venv"]


def test_the_shared_queue_grants_and_can_be_looked_at(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    code = block("python", "SqliteQueue(").replace(
        "reserve=50", "reserve=50, interval=0.01, margin=0.02"
    )
    names = {}
    exec(code, names)
    names["queue"].close()
    assert capsys.readouterr().out.startswith("<Permit shard_id=7 bucket=0 ")
    command = shlex.split(block("sh", "status --sqlite"))
    assert command[:3] == ["python3", "-m", "gateway_queue_sync"]
    assert command.pop() == "--watch"
    assert cli.main(command[3:]) == 0
    assert "left today  999 of 1000" in capsys.readouterr().out


def test_the_remote_queue_asks_its_broker(tmp_path, capsys):
    with SqliteQueue(tmp_path / "q", interval=0.01, margin=0.02) as queue:
        with serve(queue, port=0) as broker:
            changes = {"http://127.0.0.1:8787": broker.url, '")\nwith': '", margin=0.02)\nwith'}
            run("HttpQueue(", changes=changes)["queue"].close()
    assert capsys.readouterr().out.startswith("<Permit shard_id=7 bucket=0 ")


def test_the_plan_is_what_the_comment_says(capsys):
    run("plan_start(")
    said = block("python", "plan_start(").split("print(plan)  # ")[1]
    assert capsys.readouterr().out == said


def blocks_named_in(path):
    """The language of each block that a file of tests runs, and the text that it is found by."""
    tree = ast.parse(path.read_text())
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


NAMED = [one for path in Path(__file__).parent.glob("*.py") for one in blocks_named_in(path)]
NAMED += [("python", text) for text, *_ in SHARED.values()]
CODE = [one for one in BLOCKS if one[0] in {"python", "js"}]


@pytest.mark.parametrize(("language", "code"), CODE, ids=[code.split("\n")[0] for _, code in CODE])
def test_each_block_of_code_is_named_by_a_test_that_runs_it(language, code):
    assert any(named == language and text in code for named, text in NAMED)


def test_the_recipes_are_listed_as_in_their_folder():
    listed = Path(gateway_queue_sync.__file__).parent.joinpath("recipes/README.md").read_text()
    rows = [line for line in listed.splitlines() if line.startswith("|")]
    assert len(rows) > 2
    assert "\n".join(rows) in README
