"""No file that the package reads can run code: nothing unpickles."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
UNPICKLERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def findings(source: str) -> list[str]:
    """Imports of unpicklers, torch.load without weights_only=True, numpy loads that may unpickle, unsafe YAML."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in UNPICKLERS]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module] if (node.module or "").split(".")[0] in UNPICKLERS else []
            if (node.module or "").split(".")[0] in ("torch", "numpy"):
                found += [f"{node.module}.load" for alias in node.names if alias.name == "load"]
        elif isinstance(node, ast.Call):
            found += _unsafe_call(node)
    return found


def _unsafe_call(node: ast.Call) -> list[str]:
    name = ast.unparse(node.func)
    given = {word.arg: ast.unparse(word.value) for word in node.keywords}
    if name == "torch.load":
        return [] if given.get("weights_only") == "True" else [name]
    if name.startswith(("np.", "numpy.")):
        return [name] if given.get("allow_pickle", "False") != "False" else []
    if name in ("pandas.read_pickle", "pd.read_pickle", "yaml.unsafe_load", "yaml.full_load"):
        return [name]
    return []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import pickle", ["pickle"]),
        ("def f():\n    from dill.settings import x", ["dill.settings"]),
        ("from torch import load", ["torch.load"]),
        ("torch.load(path)", ["torch.load"]),
        ("torch.load(path, weights_only=False)", ["torch.load"]),
        ("torch.load(path, weights_only=flag)", ["torch.load"]),
        ("torch.load(path, weights_only=True)", []),
        ("np.load(path, allow_pickle=True)", ["np.load"]),
        ("np.load(path)", []),
        ("yaml.unsafe_load(text)", ["yaml.unsafe_load"]),
    ],
)
def test_the_search_finds(source: str, found: list[str]) -> None:
    assert findings(source) == found


def test_nothing_unpickles() -> None:
    files = [path for folder in ("mosaic_dist", "data_prep", "recipes") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    wrong = {str(path.relative_to(ROOT)): found for path in files if (found := findings(path.read_text()))}
    assert wrong == {}
