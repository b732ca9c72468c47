"""No module imports one that imports it, on however long a way, at its top or inside a function."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path, modules) -> set[str]:
    """Returns those of the modules that a file imports. An extension that is no Python file is not among them."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            of_package = any(n not in modules and not n.endswith("._C") for n in names)
            found |= {*names, *([node.module] if of_package else [])}
    return found & set(modules)


def circles(root: Path) -> set[frozenset[str]]:
    paths = {
        module_name(p, root): p for top in ("bench", "seqconv") for p in (root / top).rglob("*.py")
    }
    reached = {name: imported(path, paths) for name, path in paths.items()}
    for middle in reached:  # the transitive closure
        for name in reached:
            if middle in reached[name]:
                reached[name] = reached[name] | reached[middle]
    return {
        frozenset(other for other in reached[name] if name in reached[other])
        for name in reached
        if name in reached[name]
    }


def test_there_is_no_import_circle():
    assert not circles(ROOT), [sorted(circle) for circle in circles(ROOT)]


def test_a_circle_is_found(tmp_path):
    for name, text in {
        "bench/__init__.py": "",
        "bench/a.py": "from bench import b\n",
        "bench/b.py": "def late():\n    import bench.c.d\n",
        "bench/c/__init__.py": "",
        "bench/c/d.py": "from bench.a import anything\n",
        "bench/c/e.py": "from bench.a import anything\n",
        "seqconv/__init__.py": "from seqconv import cpu\n",
        "seqconv/cpu.py": "from seqconv import _C\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert circles(tmp_path) == {frozenset({"bench.a", "bench.b", "bench.c.d"})}
