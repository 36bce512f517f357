"""The seams: shared <- stages <- launch, configurations without torch, no stage imports another."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("pretrain", "semi", "finetune", "evaluation")


def imported_packages(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("package", ["poserelay", *STAGES])
def test_no_package_imports_a_stage_but_its_own(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    allowed = {package} if package != "poserelay" else set()
    for file in files:
        foreign = imported_packages(file) & {*STAGES, "launch"} - allowed
        assert not foreign, f"{file.relative_to(ROOT)} imports {foreign}"


def test_the_seams_are_looked_for_in_real_files() -> None:
    assert len(list((ROOT / "poserelay").rglob("*.py"))) > 20
    assert "poserelay" in imported_packages(ROOT / "finetune" / "train.py")


def test_configurations_import_without_torch() -> None:
    modules = [
        "poserelay",
        "poserelay.config",
        "poserelay.command",
        "poserelay.run",
        "poserelay.subsets",
        "poserelay.__main__",
    ]
    modules += [f"{stage}.config" for stage in STAGES if (ROOT / stage / "config.py").exists()]
    modules += [f"{stage}.__main__" for stage in STAGES if (ROOT / stage / "__main__.py").exists()]
    modules += [f"launch.{path.stem}" for path in (ROOT / "launch").glob("*.py")]
    code = f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_stages_have_configs_and_mains() -> None:
    for stage in ("pretrain", "finetune", "evaluation"):
        assert (ROOT / stage / "config.py").exists()
        assert (ROOT / stage / "__main__.py").exists()
