"""docs/traps.md names every trap, with a test that exists."""

import ast
import re
from pathlib import Path

HERE = Path(__file__).parent
ROW = re.compile(r"^\| (\d+) \| (.+?) \| (.+) \|$", re.MULTILINE)
NAMED = re.compile(r"`(test_\w+\.py)::(\w+)`")


def rows():
    return [(int(number), cell) for number, _, cell in ROW.findall((HERE.parent / "docs" / "traps.md").read_text())]


def test_every_trap_has_a_row():
    assert [number for number, _ in rows()] == list(range(1, 45))


def test_every_row_names_tests_that_exist():
    for number, cell in rows():
        named = NAMED.findall(cell)
        assert named, f"trap {number} names no test"
        for file, test in named:
            tree = ast.parse((HERE / file).read_text())
            functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
            assert test in functions, f"trap {number}: there is no {file}::{test}"
