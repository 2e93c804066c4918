"""Docstrings: of every public name, complete, and with code that runs."""

from __future__ import annotations

import ast
import asyncio
import builtins
import dataclasses
import enum
import inspect
import pydoc
import re
import textwrap
import threading
from pathlib import Path

import pytest

import gateway_queue_sync
from gateway_queue_sync import LocalQueue, testing

PACKAGE = Path(gateway_queue_sync.__file__).parent
PUBLIC = {name: getattr(gateway_queue_sync, name) for name in gateway_queue_sync.__all__} | {
    f"testing.{name}": getattr(testing, name) for name in ("FakeClock", "Referee", "Refusal")
}
SOURCE = "https://discord.com/developers/docs/topics/gateway"


def explained():
    """Every public class, function, method and property, by its name."""
    for name, thing in PUBLIC.items():
        if not (inspect.isclass(thing) or inspect.isfunction(thing)):
            continue
        yield name, thing
        if inspect.isclass(thing):
            for member in sorted(dir(thing)):
                value = inspect.getattr_static(thing, member)
                if isinstance(value, classmethod):
                    value = getattr(thing, member)
                ours = getattr(value, "fget", value)
                if member.startswith("_") or not is_ours(ours):
                    continue
                if callable(value) or isinstance(value, property):
                    yield f"{name}.{member}", value


def is_ours(thing):
    return (getattr(thing, "__module__", None) or "").startswith("gateway_queue_sync")


EXPLAINED = dict(explained())


def section(doc, title):
    """The entries of a section, by name: ``name: what it is``, of one name or of several."""
    found = re.search(rf"^{title}:\n((?:    .*\n?|\n)+)", doc + "\n", re.MULTILINE)
    entries = {}
    for entry in re.split(r"\n(?=    \S)", found[1].rstrip() if found else ""):
        names, _, text = entry.strip().partition(":")
        for name in names.split(","):
            if name.strip():
                entries[name.strip()] = text.strip()
    return entries


def is_made_by_users(kind):
    """Tell classes that are made with arguments of ours from protocols, enums and plain errors."""
    return is_ours(kind.__init__) and not (
        issubclass(kind, enum.Enum) or getattr(kind, "_is_protocol", False)
    )


def parameters(thing):
    """What a call takes, with its types."""
    if isinstance(thing, property) or (inspect.isclass(thing) and not is_made_by_users(thing)):
        return {}
    made = thing.__init__ if inspect.isclass(thing) else thing
    taken = inspect.signature(made).parameters
    return {name: parameter.annotation for name, parameter in taken.items() if name != "self"}


def test_it_finds_what_is_public():
    assert len(EXPLAINED) > 80
    assert {"LargeBotQueue.acquire", "SqliteQueue.from_token", "Permit.sent", "plan_start"} <= set(
        EXPLAINED
    )


@pytest.mark.parametrize("name", EXPLAINED)
def test_pydoc_explains_every_public_name(name):
    thing = EXPLAINED[name]
    doc = inspect.getdoc(thing)
    assert doc, f"{name} has no docstring"
    assert doc.splitlines()[0] in pydoc.plain(pydoc.render_doc(thing))
    assert doc.splitlines()[0].endswith((".", "?", "``")), "the first line is a sentence"


@pytest.mark.parametrize("name", EXPLAINED)
def test_every_argument_is_explained_under_its_name(name):
    thing = EXPLAINED[name]
    doc, takes = inspect.getdoc(thing), parameters(thing)
    named = section(doc, "Args") or section(doc, "Attributes")
    if dataclasses.is_dataclass(thing) or "Args:" in doc:
        assert sorted(named) == sorted(takes) or (len(takes) < 2 and not named)
    elif len(takes) > 1:
        assert set(takes) <= set(named), f"{name} has {len(takes)} arguments and does not name all"
    assert all(named.values())


@pytest.mark.parametrize("name", EXPLAINED)
def test_durations_have_a_unit(name):
    thing = EXPLAINED[name]
    doc = inspect.getdoc(thing)
    named = section(doc, "Args") or section(doc, "Attributes")
    for argument, kind in parameters(thing).items():
        if "float" in str(kind) and argument in named:
            assert re.search(r"\bseconds?\b|\bas for ``", named[argument]), (name, argument)


@pytest.mark.parametrize("name", EXPLAINED)
def test_what_is_said_to_be_raised_can_be(name):
    for raised in section(inspect.getdoc(EXPLAINED[name]), "Raises"):
        kind = getattr(gateway_queue_sync, raised, None) or getattr(builtins, raised)
        assert issubclass(kind, BaseException)


def test_what_takes_a_shard_says_what_it_raises():
    for name in ("acquire", "try_acquire", "enqueue", "update", "snapshot"):
        assert section(inspect.getdoc(EXPLAINED[f"GatewayQueue.{name}"]), "Raises"), name


@pytest.mark.parametrize(
    "name", ["SessionStartLimit", "SessionLimitExhausted", "GatewayQueue", "plan_start"]
)
def test_rules_name_their_source(name):
    assert SOURCE in inspect.getdoc(EXPLAINED[name])


def assigned():
    """The names that modules assign, with the docstring below each."""
    for path in PACKAGE.rglob("*.py"):
        body = ast.parse(path.read_text()).body
        for statement, below in zip(body, [*body[1:], None], strict=True):
            if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
                doc = below.value if isinstance(below, ast.Expr) else None
                yield statement.targets[0].id, getattr(doc, "value", None)


def test_figures_and_types_are_explained_below_them():
    docs = dict(assigned())
    rest = [name for name in PUBLIC if name not in EXPLAINED]
    assert rest == ["Event", "Observer", "DEFAULT_MARGIN", "IDENTIFY_INTERVAL", "SESSION_PERIOD"]
    for name in rest:
        assert docs[name], name


# --- code in docstrings ---------------------------------------------------------------------------


def blocks():
    """The code in every docstring of the package, by the name of what it explains."""
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        tree = ast.parse(path.read_text())
        named = [(module, tree)]
        while named:
            name, node = named.pop()
            doc = ast.get_docstring(node) or ""
            for code in re.findall(r"::\n\n((?:    .*\n|\n)+)", doc + "\n"):
                yield name, textwrap.dedent(code).strip()
            named += [
                (f"{name}.{child.name}", child)
                for child in node.body
                if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            ]


class WebSocket:
    def __init__(self):
        self.sent = []

    def send(self, payload):
        self.sent.append(payload)


def in_package():
    """Ready a bot's websocket."""
    names = {**vars(gateway_queue_sync), "shard_id": 3, "identify": {"op": 2}}
    names["websocket"] = WebSocket()
    return names, lambda: names["websocket"].sent == [{"op": 2}]


def in_plan_start():
    names = {**vars(gateway_queue_sync)}
    return names, lambda: names["plan"].remaining == 936


def in_fake_clock():
    """Ready two threads that wait for a permit."""
    clock = testing.FakeClock()
    queue = LocalQueue(clock=clock)
    queue.acquire(0)
    threads = [threading.Thread(target=queue.acquire, args=(n,)) for n in (1, 2)]
    for thread in threads:
        thread.start()

    def check():
        granted = queue.snapshot().granted
        clock.advance(5.25)
        for thread in threads:
            thread.join(10)
        return granted == 2

    return {"clock": clock}, check


READY = {
    "__init__": in_package,
    "plan.plan_start": in_plan_start,
    "testing.FakeClock": in_fake_clock,
}


def test_every_block_of_code_is_run_below():
    assert sorted(name for name, _ in blocks()) == sorted(READY)


@pytest.mark.parametrize(("name", "code"), list(blocks()))
def test_code_in_docstrings_runs(name, code):
    names, check = READY[name]()
    compiled = compile(code, name, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    if compiled.co_flags & inspect.CO_COROUTINE:
        asyncio.run(eval(compiled, names))
    else:
        exec(compiled, names)
    assert check()
