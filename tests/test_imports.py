"""The house stands as drawn: import arrows, and who may import what."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "sora_jax"

# A module may import modules of its own floor and of the floors above its own in this list.
FLOORS = [
    {"structs", "disk", "fingerprints"},
    {"processes"},
    {"sharding", "signals", "seal"},
    {"nn"},
    {"models"},
    {"diffusion", "data"},
    {"config"},
    {"compute", "checkpoint", "text", "evaluate", "hlo"},
    {"generate", "export", "checkpoint_text"},
    {"train"},
    {"study", "plan"},
    {"cli"},
    {"main"},
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def imported(path: Path) -> set[str]:
    """Dotted names of all imports of a file, also those inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrows(path):
    mine = FLOOR[part(path)]
    for name in imported(path):
        if name.startswith("sora_jax."):
            other = name.split(".")[1]
            if other in FLOOR:
                assert FLOOR[other] <= mine, f"{path.name} imports {name} against the arrows"


def test_nothing_is_unpickled():
    """numpy's loader is called for no file: disk.py reads arrays and never objects."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            assert name not in ("np.load", "eval", "exec", "pickle.load", "pickle.loads", "np.fromfile"), path
            assert not any(word.arg == "allow_pickle" for word in getattr(node, "keywords", ())), path


def test_diffusion_and_data_do_not_import_each_other():
    for path in FILES:
        if part(path) in ("diffusion", "data"):
            other = {"diffusion": "data", "data": "diffusion"}[part(path)]
            assert not any(name.startswith(f"sora_jax.{other}") for name in imported(path)), path


@pytest.mark.parametrize(
    ("library", "allowed"),
    [
        ("orbax", {"checkpoint"}),
        ("ml_collections", {"cli", "config"}),
        ("tensorstore", {"checkpoint"}),
        ("torch", set()),
        ("transformers", set()),
        ("argparse", {"cli", "main"}),
        # What a pickle says is run; torch_file reads its instructions without running them.
        ("pickle", set()),
        ("pickletools", {"evaluate"}),
        ("safetensors", {"disk", "export"}),  # export writes
        ("zipfile", {"disk", "evaluate"}),
        # grain reads flags of it, which someone has to mark as parsed.
        ("absl", {"cli", "data"}),
    ],
)
def test_only_there(library, allowed):
    users = {part(path) for path in FILES if any(name.split(".")[0] == library for name in imported(path))}
    assert users <= allowed


@pytest.mark.parametrize(("folder", "library"), [("data", "jax"), ("data", "flax"), ("diffusion", "flax")])
def test_not_there(folder, library):
    for path in (PACKAGE / folder).rglob("*.py"):
        assert library not in {name.split(".")[0] for name in imported(path)}, path


def test_only_sharding_names_mesh_axes():
    from sora_jax import sharding

    for path in FILES:
        if part(path) == "sharding":
            continue
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        for call in calls:
            name = getattr(call.func, "id", getattr(call.func, "attr", ""))
            assert name not in ("PartitionSpec", "P"), f"{path.name} makes a partition spec"
    assert set(sharding.AXES) == {"data", "fsdp", "tensor", "sequence"}


@pytest.mark.parametrize(
    "modules",
    [
        "sora_jax.data.pack, sora_jax.data.latents, sora_jax.data.worlds.clips",
        # What is asked is checked before anything heavy is loaded.
        "sora_jax.generate.media, sora_jax.generate.requests, sora_jax.generate.layouts, sora_jax.generate.manifest",
    ],
)
def test_these_load_no_jax(modules):
    code = f"import sys, {modules}; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "False"
