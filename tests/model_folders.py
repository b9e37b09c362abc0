"""The stages that read a model folder, as they are tried on every odd one."""

from __future__ import annotations

STAGES = ("prepare", "generate", "evaluate", "check")


def commands(folder, drafter, chats, out):
    """The command of each of `STAGES` for a target's folder, a drafter beside it, and conversations."""
    target = [f"target.path={folder}", "max_new_tokens=8"]
    task = [f"drafters={{a: {drafter}}}", f"tasks=[{{name: chat, inputs: {chats}}}]"]
    return {
        "prepare": ["prepare", f"inputs={chats}", f"tokenizer={folder}", f"out={out / 'x'}", "format=chat"],
        "generate": ["generate", *target, f"seeds.inputs={chats}", f"out={out / 'y'}", "--dry-run"],
        "evaluate": ["evaluate", *target, *task, f"out={out / 'z'}", "--dry-run"],
        "check": ["export", "--check", folder, f"drafter={drafter}"],
    }
