"""The order of the house: who may import whom, and that a file and a function stay small enough to be read.

Rooms are the folders of nanodiff/; the files beside them are the ground (errors, files, flags, ...) or commands. A room
imports only rooms to its left in ROOMS. Imports inside functions count like any other; only `__main__` files are doors.
"""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("ground", "diffusion", "models", "fast", "formats", "data", "tomography", "worlds", "classifiers", "metrics",
         "training", "pipelines", "finetune", "report", "commands")
GROUND = ("errors", "files", "flags", "rng", "plots", "pixels")  # files; all other files beside the rooms are commands
DEPENDENCIES = {"torch", "numpy", "scipy", "PIL", "tifffile", "tokenizers", "safetensors"}
LINES, ARGUMENTS, FILE = 60, 7, 400

# Larger than the house allows, one by one, with the reason.
LONG_FUNCTIONS = {}
MANY_ARGUMENTS = {
    "nanodiff/diffusion/samplers.py sample": "the one call for whoever wants a picture; a fixed name",
    "nanodiff/pipelines/stable_diffusion.py generate": "all that a user may ask of a picture; a fixed name",
    "nanodiff/diffusion/elbo.py terms": "all that bits_per_dim and rate_distortion (fixed names) may be asked",
    "nanodiff/pipelines/ddpm.py generate": "all that a user may ask of a picture",
    "nanodiff/data/folder.py Folder.__init__": "all that a folder of pictures may be; all but one have defaults",
    "nanodiff/tomography/slices.py Slices.__init__": "all that a set of slices may be; all but one have defaults",
    "nanodiff/tomography/volumes.py Volume.__init__": "all that a volume may be; all but one have defaults",
    "nanodiff/pipelines/ddpm.py DDPM.__init__": "what a saved DDPM consists of, one argument for each part",
}
LONG_FILES = {}

FILES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
         for path in sorted([*ROOT.glob("nanodiff/**/*.py"), *ROOT.glob("train_*.py")])}
MODULES = {name.removesuffix(".py").removesuffix("/__init__").replace("/", "."): name for name in FILES}


def imports(tree, file=""):
    """The modules that a file imports anywhere in it, by their full names: nanodiff's as MODULES calls them."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = node.module
            if node.level:  # from .room import name
                package = ".".join([*file.split("/")[:-node.level], node.module or ""]).strip(".")
            inner = {f"{package}.{alias.name}" for alias in node.names}
            found |= {name for name in inner if name in MODULES}
            if any(name not in MODULES for name in inner):
                found.add(package)
    return found


GRAPH = {name: sorted(MODULES[module] for module in imports(tree, name) if module in MODULES)
         for name, tree in FILES.items()}


def room(name):
    """The room of a file."""
    parts = name.split("/")
    if len(parts) == 1:
        return "commands"  # a script
    if len(parts) > 2:
        return parts[1]
    if parts[1] == "__init__.py":
        return "pipelines"  # the door `nanodiff.load`, which opens a pipeline
    return "ground" if parts[1].removesuffix(".py") in GROUND else "commands"


def circle(graph):
    """A circle in {node: nodes it leads to}, or none: []."""
    done, way = set(), []

    def visit(node):
        if node in way:
            return way[way.index(node):]
        if node in done:
            return []
        way.append(node)
        found = next((found for following in graph[node] if (found := visit(following))), [])
        way.pop()
        done.add(node)
        return found

    return next((found for node in graph if (found := visit(node))), [])


def functions(tree, name=""):
    """[(qualified name, node)] of all functions, nested ones too."""
    found = []
    for node in ast.iter_child_nodes(tree):
        inner = f"{name}.{node.name}".strip(".") if hasattr(node, "name") and not isinstance(node, ast.alias) else name
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found.append((inner, node))
        found += functions(node, inner)
    return found


def test_the_walk_of_imports_sees_those_inside_functions_and_every_room():
    assert {room(name) for name in FILES} == set(ROOMS)
    assert imports(ast.parse("def f():\n    from nanodiff import rng, plots\n    import PIL.Image")) == {
        "nanodiff.rng", "nanodiff.plots", "PIL.Image"}
    assert circle({"a": ["b"], "b": ["c"], "c": ["b"]}) == ["b", "c"] and circle({"a": ["b"], "b": []}) == []


@pytest.mark.parametrize("name", [name for name in FILES if not name.endswith("__main__.py")])
def test_a_room_imports_only_rooms_to_its_left(name):
    own = ROOMS.index(room(name))
    wrong = [other for other in GRAPH[name] if room(other) != room(name) and ROOMS.index(room(other)) >= own]
    assert wrong == [], f"{name} ({room(name)}) imports {', '.join(f'{one} ({room(one)})' for one in wrong)}"


def test_no_files_import_each_other_in_a_circle():
    assert circle({name: others for name, others in GRAPH.items() if not name.endswith("__main__.py")}) == []


def test_no_rooms_import_each_other_in_a_circle():
    rooms = {one: set() for one in ROOMS}
    for name, others in GRAPH.items():
        if not name.endswith("__main__.py"):
            rooms[room(name)] |= {room(other) for other in others} - {room(name)}
    assert circle(rooms) == []


def test_nothing_imports_a_script():
    scripts = {name.removesuffix(".py") for name in FILES if name.startswith("train_")}
    assert len(scripts) == 14 and [name for name, tree in FILES.items() if imports(tree, name) & scripts] == []


def test_diffusion_knows_tensors_and_nothing_else_of_the_house():
    for name, others in GRAPH.items():
        assert room(name) != "diffusion" or {room(other) for other in others} <= {"diffusion"}, name
        outside = {module.split(".")[0] for module in imports(FILES[name], name)} - set(sys.stdlib_module_names)
        assert room(name) != "diffusion" or outside <= {"torch", "numpy", "nanodiff"}, name


@pytest.mark.parametrize("name", FILES)
def test_nothing_is_needed_but_the_listed_packages(name):
    outside = {module.split(".")[0] for module in imports(FILES[name], name)} - set(sys.stdlib_module_names)
    assert outside - DEPENDENCIES - {"nanodiff"} == set()


@pytest.mark.parametrize("name", FILES)
def test_functions_fit_a_screen_and_take_few_arguments(name):
    for function, node in functions(FILES[name]):
        lines = node.end_lineno - node.lineno + 1
        arguments = [one.arg for one in node.args.posonlyargs + node.args.args + node.args.kwonlyargs]
        arguments = [one for one in arguments if one not in ("self", "cls", "ctx")]
        assert lines <= LINES or f"{name} {function}" in LONG_FUNCTIONS, f"{function} has {lines} lines"
        allowed = {f"{name} {function}", f"{name} {function.split('.')[-1]}"} & MANY_ARGUMENTS.keys()
        assert len(arguments) <= ARGUMENTS or allowed, f"{function} takes {', '.join(arguments)}"


@pytest.mark.parametrize("name", FILES)
def test_files_are_short_enough_to_be_read(name):
    lines = len((ROOT / name).read_text(encoding="utf-8").splitlines())
    assert lines <= FILE or name in LONG_FILES, f"{name} has {lines} lines"


def test_every_exception_is_still_needed():
    sizes = {f"{name} {function}": node for name, tree in FILES.items() for function, node in functions(tree)}
    short = {f"{key.split(' ')[0]} {key.split('.')[-1]}": node for key, node in sizes.items()}
    for key in LONG_FUNCTIONS:
        assert sizes[key].end_lineno - sizes[key].lineno + 1 > LINES, key
    for key in MANY_ARGUMENTS:
        node = sizes.get(key) or short[key]
        assert len(node.args.posonlyargs + node.args.args + node.args.kwonlyargs) > ARGUMENTS, key
    for name in LONG_FILES:
        assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) > FILE, name
