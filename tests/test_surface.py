"""The surface: names, import directions, what an import loads, docstrings, examples of use."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import gateway_queue_sync

PACKAGE = Path(gateway_queue_sync.__file__).parent
ROOT = PACKAGE.parent

NAMES = """
GatewayQueue HttpQueue LargeBotQueue LocalQueue NoOpQueue Queue RedisQueue SqliteQueue serve
BucketSnapshot LimitSnapshot Permit QueueSnapshot Report SessionStartLimit WaitingShard
AcquireTimeout BrokerError GatewayBotError GatewayQueueError QueueClosed SessionLimitExhausted
BudgetExhausted Event LimitUpdated Observer PermitReported ShardGranted ShardLeft ShardWaiting
ShardStart StartPlan plan_start
DEFAULT_MARGIN IDENTIFY_INTERVAL SESSION_PERIOD
"""

# What each module may import, from the ground up; a module imports only what stands before it.
FLOORS = [
    ["errors", "clock", "models", "wording"],
    ["events", "rules", "lines", "gateway_bot"],
    ["forecast", "ledgers", "messages", "plan", "journal"],
    ["ledgers.memory", "ledgers.wire", "turns"],
    ["ledgers.shared", "ledgers.tables"],
    ["ledgers.file"],
    ["ledgers.sqlite", "ledgers.redis", "ledgers.http"],
    ["waiting"],
    ["queue"],
    ["in_memory", "shared"],
    ["policies"],
    ["broker.address", "broker.metrics", "broker.places", "broker.throttle", "broker.wire"],
    ["broker.connection"],
    ["broker.desk"],
    ["broker.server"],
    ["broker"],
    ["__init__", "testing"],
    ["broker.command"],
    ["demo.gateway"],
    ["demo.fleet"],
    ["demo.display", "demo.summary"],
    ["planner.fleet"],
    ["planner.picture", "planner.timeline"],
    ["demo", "planner", "status"],
    ["cli"],
    ["__main__"],
]
LOADED_WHEN_NEEDED = ("gateway_bot", "ledgers.http", "ledgers.redis", "ledgers.sqlite")
FLOOR_OF = {module: number for number, floor in enumerate(FLOORS) for module in floor}


def test_the_public_names_are_these():
    assert sorted(gateway_queue_sync.__all__) == sorted(NAMES.split())
    for name in gateway_queue_sync.__all__:
        assert getattr(gateway_queue_sync, name) is not None


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        yield name.removesuffix(".__init__") if "." in name else name, path


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
            "gateway_queue_sync"
        ):
            module = node.module.removeprefix("gateway_queue_sync").lstrip(".")
            for alias in node.names:
                whole = f"{module}.{alias.name}".lstrip(".")
                yield whole if whole in FLOOR_OF else module or "__init__"


@pytest.mark.parametrize(("name", "path"), list(modules()))
def test_imports_point_one_way(name, path):
    for imported in imports(path):
        if name == "policies" and imported in LOADED_WHEN_NEEDED:
            continue
        if name == "broker.connection" and imported == "broker.desk":
            continue  # for types alone
        lower = FLOOR_OF[imported] < FLOOR_OF[name]
        same = FLOOR_OF[imported] == FLOOR_OF[name] == 1 and imported == "rules"
        assert lower or same, f"{name} must not import {imported}"


def test_importing_the_package_loads_no_more_than_it_needs():
    heavy = {"sqlite3", "redis", "http", "urllib", "asyncio", "socket", "ssl", "email"}
    code = (
        "import sys; before = set(sys.modules); import gateway_queue_sync; print(*set(sys.modules))"
    )
    loaded = subprocess.run(
        [
            sys.executable,
            "-I",
            "-S",
            "-c",
            f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}",
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert heavy.isdisjoint(loaded)


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
                extra = top == "redis" and path.stem in (
                    "redis",
                    "policies",
                )  # and here for types alone
                assert ours or extra, (path, root)


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
