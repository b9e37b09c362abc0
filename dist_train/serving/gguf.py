"""GGUF, the file that llama.cpp loads, through llama.cpp's own converter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from dist_train.errors import UserError

CONVERTER = "convert_hf_to_gguf.py"
_MAGIC = b"GGUF"


def find_converter(llama_cpp: Path) -> Path:
    """The converter in llama.cpp's source folder. Raises UserError where there is none."""
    converter = llama_cpp / CONVERTER
    if not converter.is_file():
        raise UserError(f"{llama_cpp}: no {CONVERTER} in it; name the source folder of llama.cpp")
    return converter


def write_gguf(folder: Path, out: Path, llama_cpp: Path, gguf_type: str) -> None:
    """Convert the Hugging Face folder to `out`; `gguf_type`: f32, f16 or bf16, as the converter calls them.

    Raises UserError with the converter's last line when it fails or leaves no file, or where what it leaves is no GGUF.
    """
    command = [sys.executable, find_converter(llama_cpp), folder, "--outfile", out, "--outtype", gguf_type]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode or not out.exists():
        said = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise UserError(f"{CONVERTER} cannot convert {folder}: {said}")
    with out.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise UserError(f"{CONVERTER} wrote no GGUF: {out.name} begins otherwise; fetch llama.cpp again")
