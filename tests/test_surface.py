"""The public surface: names, import directions, what an import loads, docstrings, examples of use."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import itertools
import pydoc
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import gateway_queue_sync
from gateway_queue_sync.settings import Settings

PACKAGE = Path(gateway_queue_sync.__file__).parent
ROOT = PACKAGE.parent

NAMES = """
GatewayQueue HttpQueue LargeBotQueue LocalQueue NoOpQueue Queue RedisQueue SqliteQueue serve
BucketSnapshot LimitSnapshot Permit QueueSnapshot Report SessionStartLimit WaitingShard
AcquireTimeout LedgerError GatewayBotError GatewayQueueError QueueClosed SessionLimitExhausted
BudgetExhausted Event LimitUpdated Observer PermitReported ShardGranted ShardLeft ShardWaiting
ShardStart StartPlan plan_start
DEFAULT_MARGIN IDENTIFY_INTERVAL SESSION_PERIOD
"""

# What each module may import, from the ground up; a module imports only what stands before it.
FLOORS = [
    ["errors", "clock", "models", "format"],
    ["events", "token_bucket", "gateway_bot"],
    ["future", "limits", "settings"],
    ["lines"],
    ["forecast", "plan", "limit_reader", "log"],
    ["ledgers", "observers", "process"],
    ["ledgers.memory", "ledgers.shared", "ledgers.shared.messages"],
    [f"ledgers.shared.{name}" for name in ("answers", "backend", "bounds", "round_trips", "store")],
    ["ledgers.shared.stored_lines"],
    [f"ledgers.shared.{name}" for name in ("session", "rows", "store_sqlite", "store_redis")],
    ["ledgers.shared.inquiry"],
    ["ledgers.remote", "ledgers.shared.limits", "ledgers.shared.sqlite_file"],
    ["ledgers.shared.turns"],
    [f"ledgers.shared.{name}" for name in ("sqlite", "redis", "http")],
    ["worker"],
    ["scheduler"],
    ["queue"],
    ["policies"],
    ["request_parser"],
    ["broker.responses", "broker.positions", "broker.settings"],
    ["broker.waiting", "broker.reports", "broker.connection"],
    ["broker.ledger"],
    ["broker.routes"],
    ["broker.server"],
    ["broker"],
    ["__init__", "testing", "aio"],
    ["recipes", "recipes.held_identify", "recipes.threaded", "recipes.betterdisco"],
    ["recipes.discord_py", "recipes.interactions_py", "recipes.hikari"],
    ["recipes.websocket_client", "recipes.websockets_sync"],
    ["environment"],
    ["serve_command"],
    ["demo.gateway"],
    ["demo.fleet"],
    ["demo.display", "demo.summary"],
    ["planner.fleet"],
    ["planner.picture", "planner.timeline"],
    ["demo", "planner", "recipe_command", "status"],
    ["limit_command"],
    ["cli"],
    ["__main__"],
]
FLOOR_OF = {module: number for number, floor in enumerate(FLOORS) for module in floor}

# The shape of the core: whatever stands in a line comes before all that stands in the next one.
CORE = [
    ["models"],
    ["token_bucket"],
    ["limits", "lines", "settings", "forecast", "ledgers"],
    ["worker", "scheduler"],
    ["queue"],
    ["policies"],
    ["broker", "cli"],
]
# What an import of the package loads, and nothing else of it: what few need is loaded when it is used.
CORE_MODULES = (
    *("errors", "clock", "models", "format", "events", "token_bucket", "limits", "lines"),
    *("settings", "forecast", "plan", "limit_reader", "log"),
    *("ledgers", "ledgers.memory", "ledgers.remote", "ledgers.shared"),
    *(f"ledgers.shared.{name}" for name in ("messages", "answers", "backend", "session")),
    *(f"ledgers.shared.{name}" for name in ("round_trips", "stored_lines", "inquiry")),
    *("observers", "future", "process", "worker", "scheduler", "queue", "policies"),
)
# What a module of the core takes from above for types alone: it is handed one as an argument.
HANDED = {name: {"scheduler"} for name in ("worker", "process", "limit_reader", "ledgers.remote")}
HANDED["process"] |= {"ledgers.remote"}
GONE = ("rules", "waiting", "in_memory", "shared", "journal", "wording", "turns", "messages")
MEMBERS = "acquire close closed enqueue snapshot try_acquire update"


def test_the_public_names_are_these():
    assert sorted(gateway_queue_sync.__all__) == sorted(NAMES.split())
    for name in gateway_queue_sync.__all__:
        assert getattr(gateway_queue_sync, name) is not None


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        yield name.removesuffix(".__init__") if "." in name else name, path


class Imports(ast.NodeVisitor):
    """What a module imports of this package when it runs, and at what level: not for types alone."""

    def __init__(self):
        self.found = []
        self.for_types = []
        self.target = self.found

    def visit_If(self, node):
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            found, self.target = self.target, self.for_types
            for statement in node.body:
                self.visit(statement)
            self.target = found
            node.body = []
        self.generic_visit(node)

    def visit_ImportFrom(self, node):
        if (node.module or "").split(".")[0] != "gateway_queue_sync":
            return
        module = node.module.removeprefix("gateway_queue_sync").lstrip(".")
        for alias in node.names:
            whole = f"{module}.{alias.name}".lstrip(".")
            self.target.append(whole if whole in FLOOR_OF else module or "__init__")


def imports(path):
    """The modules of this package that a module imports, and those it imports for types alone."""
    visitor = Imports()
    visitor.visit(ast.parse(path.read_text()))
    return visitor.found, visitor.for_types


def test_every_module_has_its_floor():
    assert sorted(FLOOR_OF) == sorted(name for name, _ in modules())


def test_the_core_is_in_the_order_of_the_design():
    for lower, upper in itertools.pairwise(CORE):
        assert max(FLOOR_OF[module] for module in lower) < min(FLOOR_OF[module] for module in upper)


@pytest.mark.parametrize(("name", "path"), list(modules()))
def test_imports_point_one_way(name, path):
    for imported in imports(path)[0]:
        assert FLOOR_OF[imported] < FLOOR_OF[name], f"{name} must not import {imported}"


@pytest.mark.parametrize("name", [name for name in CORE_MODULES if name != "policies"])
def test_the_core_imports_nothing_from_above_for_types_either(name):
    for imported in set(imports(dict(modules())[name])[1]) - HANDED.get(name, set()):
        assert FLOOR_OF[imported] < FLOOR_OF[name], f"{name} must not import {imported}"


@pytest.mark.parametrize("name", GONE)
def test_modules_of_the_first_edition_are_gone(name):
    assert name not in dict(modules())


def classes():
    for name, _ in modules():
        if name == "__main__":
            continue
        dotted = "gateway_queue_sync" if name == "__init__" else f"gateway_queue_sync.{name}"
        module = importlib.import_module(dotted)
        for thing in vars(module).values():
            if inspect.isclass(thing) and thing.__module__ == dotted:
                yield f"{name}.{thing.__name__}", thing


@pytest.mark.parametrize(("name", "kind"), list(classes()))
def test_no_class_has_more_than_two_of_the_package_above_it(name, kind):
    above = [base for base in kind.__mro__[1:] if base.__module__.startswith("gateway_queue_sync")]
    assert len(above) <= 2, above


@pytest.mark.parametrize(
    "kind", [kind for name, kind in classes() if name.rpartition(".")[0] in CORE_MODULES]
)
def test_no_class_of_the_core_is_abstract(kind):
    assert not inspect.isabstract(kind)


@pytest.fixture(scope="module")
def loaded():
    """The modules that an import of the package loads, in a process of its own."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); "
        "import gateway_queue_sync; print(*sys.modules)"
    )
    ran = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True
    )
    return set(ran.stdout.split())


def test_importing_the_package_loads_no_more_than_it_needs(loaded):
    heavy = {"sqlite3", "redis", "http", "urllib", "asyncio", "socket", "ssl", "email"}
    assert heavy.isdisjoint(loaded)


def test_importing_the_package_loads_its_core_alone(loaded):
    ours = {name for name in loaded if name.startswith("gateway_queue_sync.")}
    assert ours == {f"gateway_queue_sync.{name}" for name in CORE_MODULES}


def test_it_depends_on_nothing_outside_the_standard_library():
    stdlib = Path(sysconfig.get_path("stdlib"))
    assert stdlib.exists()
    for _, path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            roots = []
            if isinstance(node, ast.Import):
                roots = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                roots = [node.module]
            for root in roots:
                top = root.split(".")[0]
                ours = top == "gateway_queue_sync" or top in sys.stdlib_module_names
                extra = top == "redis" and path.stem in ("redis", "policies")
                extra |= path.parent.name == "recipes"  # each imports its library when it is used
                assert ours or extra, (path, root)


def test_serve_shows_in_dir_and_in_pydoc():
    """Though it is loaded only when it is used."""
    assert "serve" in dir(gateway_queue_sync)
    assert set(gateway_queue_sync.__all__) <= set(dir(gateway_queue_sync))
    assert "serve(" in pydoc.plain(pydoc.render_doc(gateway_queue_sync))


def test_a_name_that_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'server'"):
        _ = gateway_queue_sync.server


def test_a_queue_has_these_members():
    public = {name for name in dir(gateway_queue_sync.GatewayQueue) if not name.startswith("_")}
    assert public == set(MEMBERS.split())


POLICIES = ["LocalQueue", "LargeBotQueue", "SqliteQueue", "RedisQueue", "HttpQueue"]


def settings_of(kind):
    taken = inspect.signature(kind).parameters.values()
    assert not any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in taken)
    return {p.name: p.default for p in taken if p.kind is p.KEYWORD_ONLY}


@pytest.mark.parametrize("name", POLICIES)
def test_help_shows_every_setting_by_name(name):
    kind = getattr(gateway_queue_sync, name)
    shown = pydoc.plain(pydoc.render_doc(kind))
    head, explained = shown.split("Args:")[0], shown.split("Args:")[1]
    for setting in settings_of(kind):
        assert f"{setting}:" in head, f"help({name}) does not show {setting} in its signature"
        assert f"{setting}:" in explained, f"help({name}) does not explain {setting}"


@pytest.mark.parametrize("name", POLICIES)
def test_the_defaults_of_a_policy_are_those_of_the_settings(name):
    declared = {field.name: field.default for field in dataclasses.fields(Settings)}
    taken = settings_of(getattr(gateway_queue_sync, name))
    assert {key: declared[key] for key in taken if key != "secret"} == {
        key: default for key, default in taken.items() if key != "secret"
    }


def test_help_of_sqlite_queue_shows_all_settings_of_a_shared_queue():
    shared = set(settings_of(gateway_queue_sync.LargeBotQueue))
    assert set(settings_of(gateway_queue_sync.SqliteQueue)) == shared | {"name", "lease"}


def test_every_setting_belongs_to_a_policy():
    taken = set().union(*(settings_of(getattr(gateway_queue_sync, name)) for name in POLICIES))
    assert {field.name for field in dataclasses.fields(Settings)} == taken - {"secret"}


def public_things():
    for name in gateway_queue_sync.__all__:
        thing = getattr(gateway_queue_sync, name)
        if inspect.isfunction(thing):
            yield name, thing
        if not inspect.isclass(thing):
            continue
        yield name, thing
        for member, value in vars(thing).items():
            if not member.startswith("_") and (
                inspect.isfunction(value) or isinstance(value, property)
            ):
                yield f"{name}.{member}", value


@pytest.mark.parametrize(("name", "thing"), list(public_things()))
def test_every_public_name_is_explained(name, thing):
    assert (inspect.getdoc(thing) or "").strip().endswith((".", "::", ")")), name


def test_the_usage_file_type_checks(tmp_path):
    """It is never run: it holds the types that users rely on."""
    checked = subprocess.run(
        [
            sys.executable,
            "-m",
            "mypy",
            "--strict",
            "--config-file=",
            f"--cache-dir={tmp_path}",
            "tests/usage.py",
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert checked.returncode == 0, checked.stdout
