"""models/ and diffusion/ are plain torch.nn: no tricks for speed, no branches on device, mode or dtype."""

import ast
from pathlib import Path

import pytest

import nanodiff

HOME = Path(nanodiff.__file__).parent
FILES = sorted([*HOME.glob("models/*.py"), *HOME.glob("diffusion/*.py")])
WORDS = ("is_grad_enabled", "autograd.Function", "torch._C", "torch.ops", "device.type")


def branches_on_types(tree):
    """Lines of `if`s, in whatever form, that ask for a dtype; only that of t, the time step, may be asked for."""
    tests = [node.test for node in ast.walk(tree) if isinstance(node, (ast.If, ast.IfExp, ast.While, ast.Assert))]
    tests += [test for node in ast.walk(tree) if isinstance(node, ast.comprehension) for test in node.ifs]
    return [part.lineno for test in tests for part in ast.walk(test) if isinstance(part, ast.Attribute)
            and part.attr == "dtype" and not (isinstance(part.value, ast.Name) and part.value.id == "t")]


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_a_file_holds_nothing_that_is_there_for_speed(file):
    source = file.read_text()
    for number, line in enumerate(source.splitlines(), 1):
        allowed = ("device.type",) if "autocast(" in line else ()
        found = [word for word in WORDS if word in line and word not in allowed]
        assert not found, f"{file}:{number} has {found[0]}: what is there for speed belongs into nanodiff/fast"
    assert not branches_on_types(ast.parse(source)), file
    imports = [node.module or "" for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    assert not any("fast" in module.split(".") for module in imports), file


def test_the_test_sees_what_it_looks_for():
    for source in ("if x.dtype == torch.float16: pass", "y = 1 if x.weight.dtype else 2", "[a for a in b if a.dtype]"):
        assert branches_on_types(ast.parse(source)) == [1]
    assert branches_on_types(ast.parse("if t.dtype == torch.int64: x.to(y.dtype)")) == []
    assert len(FILES) > 20
