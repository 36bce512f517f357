"""Every command of the README runs, in its order, on less data; demo.sh is the quickstart, line by line."""

from __future__ import annotations

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line.strip()]
LESS = {
    "poserelay synthesize": ["--images", "8", "--workers", "1"],
    "pretrain": ["--optim.epochs", "1", "--optim.batch_size", "4", "--workers", "0", "--threads", "1"],
    "finetune": [
        "--optim.epochs",
        "1",
        "--optim.batch_size",
        "4",
        "--labels.count",
        "4",
        "--workers",
        "0",
        "--threads",
        "1",
    ],
    "finetune cir": [
        *("--optim.steps", "2", "--optim.drops", "[]", "--optim.batch_size", "2", "--labels.count", "4"),
        *("--workers", "0", "--threads", "1"),
    ],
    "semi": [
        *("--optim.steps", "2", "--optim.batch_size", "2", "--optim.unlabelled_batch_size", "2", "--threads", "1"),
        *("--labels.ratio", "0.5", "--workers", "0", "--icon.channels", "8"),
    ],
    "poserelay select": ["--count", "4", "--workers", "0", "--threads", "1"],
    "poserelay prepare": ["--workers", "1"],
    "evaluation test": ["--workers", "0", "--threads", "1"],
    "evaluation timing": ["--threads", "1", "--workers", "0", "--repeats", "1"],
    # Of so short a training no peak reaches the threshold.
    "evaluation scio": ["--workers", "0", "--threads", "1", "--decoding.scio.proximal_threshold", "-1"],
    "evaluation embeddings": ["--workers", "0", "--threads", "1", "--neighbours", "2", "--method", "pca"],
}
LAUNCHES = {
    "launch/configs/demo.yaml": [
        *("--cluster", "debug", "--train.images", "8", "--test.images", "3", "--finetune.threads", "1"),
        *("--pretrain.optim.epochs", "1", "--pretrain.optim.batch_size", "4", "--pretrain.threads", "1"),
        *("--pretrain.workers", "0", "--finetune.workers", "0", "--evaluate.threads", "1"),
        *("--stages.finetune.sweep", '{"labels.ratio": [0.1, 0.5], "seed, labels.seed": [[0, 0]]}'),
        *("--finetune.optim.epochs", "1", "--finetune.optim.drops", "[]", "--finetune.optim.batch_size", "2"),
        *("--semi.optim.steps", "2", "--semi.optim.drops", "[]", "--semi.optim.batch_size", "2", "--semi.threads", "1"),
        *("--semi.optim.unlabelled_batch_size", "2", "--semi.labels.ratio", "0.5", "--semi.workers", "0"),
        *("--evaluate_semi.threads", "1"),
    ],
    "launch/configs/mscl_r50_imagenet.yaml": ["--dry_run"],
    "launch/configs/label_ratio_coco.yaml": ["--dry_run", "--stages.mscl.existing", "runs/demo/pretrain"],
}


def test_demo_is_the_quickstart() -> None:
    script = (ROOT / "demo.sh").read_text(encoding="utf-8")
    commands = [line.strip() for line in script.splitlines() if line.strip().startswith("python ")]
    # Started again, it resumes the launch instead of making it.
    assert [command for command in commands if " resume " not in command] == BLOCKS[0].splitlines()


def test_every_command_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for stage in ("pretrain", "semi", "finetune", "launch"):
        (tmp_path / stage).symlink_to(ROOT / stage)
    assert len(COMMANDS) > 10
    for command in COMMANDS:
        python, flag, module, *arguments = shlex.split(command)
        assert (python, flag) == ("python", "-m"), command
        main = import_module(f"{module}.__main__").main
        less = LESS.get(f"{module} {arguments[0]}") or LESS.get(module, [])
        if module == "launch" and arguments[0] == "--config":
            less = LAUNCHES[arguments[1]]
        if "--labels.file" in arguments:
            less = [*less, "--labels.count", "null"]
        assert main([*arguments, *less]) == 0, f"{command}\n{capsys.readouterr().err}"
    for made in ("collect/table.md", "collect/curves.png", "predictions/overview.jpg", "figures/losses.png"):
        assert (tmp_path / "runs/demo" / made).stat().st_size > 0
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    found: dict = {}
    exec(block, found)
    assert len(found["poses"]) == 1
    assert len(found["poses"][0]["keypoints"]) == 3 * 17


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target
