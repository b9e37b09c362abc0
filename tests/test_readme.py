"""The README's walk-through, pasted: its files, then its commands, for a small target."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from served_pair import blocks_of

README = Path(__file__).parent.parent / "README.md"
SMALLER = {
    "hidden_size: 128": "hidden_size: 16",
    "mlp_size: 352": "mlp_size: 44",
    "steps: 600": "steps: 8",
    "warmup_steps: 30": "warmup_steps: 1",
    "max_new_tokens: 128": "max_new_tokens: 24",
    "max_new_tokens: 64": "max_new_tokens: 16",
    "limit: 500": "limit: 40",
}


def test_the_walk_through_makes_a_drafter(tiny, tmp_path):
    """All commands but the last, which starts a server; then what they made passes the gate."""
    for block in blocks_of(README, "yaml"):
        (name,) = re.findall(r"^# (\w+\.yaml): ", block)
        for words, fewer in SMALLER.items():
            block = block.replace(words, fewer)
        (tmp_path / name).write_text(block.replace("TARGET", str(tiny.target)))
    prompts = [f"Say {word} {times} times" for word in ("one", "two", "three") for times in range(100)]
    (tmp_path / "instructions.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))

    (commands,) = (block for block in blocks_of(README, "bash") if "distill.yaml" in block)
    *stages, served = commands.replace("TARGET", str(tiny.target)).splitlines()
    assert "--serve" in served
    check = f"dist-train export --check {tiny.target} drafter=drafter"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-ec", "\n".join([*stages, check])],
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Block efficiency" in (tmp_path / "drafter" / "README.md").read_text()
