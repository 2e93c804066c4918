"""The ``recipe`` command."""

from __future__ import annotations

import pytest

from gateway_queue_sync import cli
from gateway_queue_sync.recipe_command import FOLDER

FILES = {one.name for one in FOLDER.iterdir() if one.is_file()} - {"README.md", "__init__.py"}


def test_without_a_name_all_are_listed(capsys):
    assert cli.main(["recipe"]) == 0
    listed = capsys.readouterr().out
    assert all(f"`{name}`" in listed for name in FILES)


@pytest.mark.parametrize("name", ["disnake", "discord_py.py"])
def test_a_recipe_is_found_by_its_library_and_by_its_file(name, capsys):
    assert cli.main(["recipe", name]) == 0
    assert capsys.readouterr().out == (FOLDER / "discord_py.py").read_text()


def test_an_unknown_name_is_said(capsys):
    assert cli.main(["recipe", "carrier pigeons"]) == 1
    assert "no recipe for 'carrier pigeons'" in capsys.readouterr().err
