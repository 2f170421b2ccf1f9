from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import editserver_client

PACKAGE = Path(editserver_client.__file__).parent

MISSING = "torch vllm numpy transformers editserver interventions sae_weights"
BLOCKED_IMPORT = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in sys.argv[2].split():
            raise ImportError(f"{name} is not there")

sys.meta_path.insert(0, Refuse())
sys.path.insert(0, sys.argv[1])
import editserver_client as c
from array import array
c.Client("http://127.0.0.1:1").close()
c.AsyncClient("http://127.0.0.1:1")
print(c.extra_body(interventions=[c.Steer(values=array("f", [1.0]), layer=1)])["interventions"][0]["values"]["shape"])
"""


def test_the_client_works_where_torch_vllm_and_numpy_are_missing() -> None:
    run = subprocess.run(
        [sys.executable, "-c", BLOCKED_IMPORT, str(PACKAGE.parent), MISSING], capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[1]"


def test_only_the_declared_dependencies_are_imported() -> None:
    allowed = {"httpx", "pydantic", "typing_extensions"} | set(sys.stdlib_module_names)
    imported = set()
    for file in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add((node.module or "").split(".")[0])
    assert {"httpx", "pydantic"} <= imported
    assert imported <= allowed


def test_every_public_name_is_exported_and_the_types_are_marked() -> None:
    assert all(hasattr(editserver_client, name) for name in editserver_client.__all__)
    assert (PACKAGE / "py.typed").exists()
