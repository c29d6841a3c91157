"""The house: files import from their own folder and from lower floors only."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
FLOORS = {
    "credentials": 0, "memory": 0, "targets": 0, "errors": 0.1, "files": 0.2, "spec": 0.2,
    "cli": 0.3, "figure": 0.3, "hardware": 0.3,
    "model": 1, "data": 1, "optim": 1,
    "parallel": 2,
    "checkpoint": 3, "convert": 3,
    "run_spec": 4, "train": 5, "evaluate": 5, "plan": 5,
    "doctor": 5.5,
    "run": 6, "compare": 6.5, "profiling": 6.5, "reproduce": 6.5, "commands": 6.5, "__main__": 7,
}  # fmt: skip
DISTRIBUTION = ("torch.distributed", "deepspeed", "mosaic_dist.parallel")


def imports(path: Path) -> list[str]:
    """Modules that a file imports, also inside functions."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.append(node.module or "")
    return found


def place(module: str) -> str:
    """Folder or file of the package that a module belongs to."""
    return module.split(".")[1] if "." in module else ""


def test_imports_go_down():
    wrong = []
    for path in sorted((ROOT / "mosaic_dist").rglob("*.py")):
        relative = path.relative_to(ROOT / "mosaic_dist")
        here = relative.parts[0].removesuffix(".py")
        for module in imports(path):
            there = place(module)
            if module.startswith("mosaic_dist") and there and here not in ("__init__", there):
                allowed = FLOORS[there] < FLOORS[here] or (here, there) == ("convert", "checkpoint")
                wrong += [] if allowed else [f"{relative} imports {module}"]
    assert wrong == []


def test_the_model_knows_one_device():
    for path in (ROOT / "mosaic_dist" / "model").rglob("*.py"):
        assert not [name for name in imports(path) if name.startswith(DISTRIBUTION)], path


def test_deepspeed_lives_in_one_place():
    for path in (ROOT / "mosaic_dist").rglob("*.py"):
        if path.parent.name != "parallel":
            assert not [name for name in imports(path) if name.split(".")[0] == "deepspeed"], path


def test_recipes_are_short_and_do_nothing_else():
    for path in (ROOT / "recipes").glob("*.py"):
        text = path.read_text()
        assert text.count("\n") <= 60, path
        conditions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.If | ast.For | ast.While)]
        assert len(conditions) <= 1, path  # `if __name__ == "__main__"`
