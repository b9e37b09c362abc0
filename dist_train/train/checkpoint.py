"""Checkpoints that exist whole or not at all.

    RUN/checkpoints/step-00000500/   deepspeed/   the engine's shards: weights, optimizer
                                     model/       the drafter as a Hugging Face folder, ready to warm-start or evaluate
                                     rng-00000.safetensors   random state of each rank
                                     manifest.json           written last: what this is, size and xxh64 of every file
    RUN/checkpoints/latest           the name of the newest one, moved atomically

A checkpoint is written as step-N.tmp and renamed once its manifest is on disk; a folder without a manifest does not
exist. A torn newest one is passed over, loudly, for the one before.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from data_shards import DataError
from data_shards.files import file_xxh64, read_json, write_atomically, write_json
from dist_train.config import CheckpointSection
from dist_train.errors import UserError
from dist_train.run_folder import CHECKPOINTS, LATEST, MANIFEST, MODEL, committed, verify
from dist_train.runtime import Runtime
from dist_train.train.engine import zero_stage

_ENGINE_TAG = "state"


class Checkpoints:
    """The checkpoints of one run. `save` and `load` are collective."""

    def __init__(self, run: Path, section: CheckpointSection, runtime: Runtime) -> None:
        self.folder, self.section, self.runtime = run / CHECKPOINTS, section, runtime

    def due(self, step: int, last_step: int) -> bool:
        """Whether to save after `step` steps."""
        return step == last_step or step % self.section.every == 0

    def save(self, step: int, engine: Any, state: dict[str, Any]) -> None:
        """Commit the run as it is after `step` steps; `state` is JSON and comes back from `load`.

        Raises UserError, on all ranks, when the disk is full; the checkpoints before stay whole.
        """
        final = self.folder / f"step-{step:08d}"
        temporary = final.with_name(f"{final.name}.tmp")
        self.runtime.agree(lambda: _fresh_folder(temporary))
        failure = None
        try:
            self._write(temporary, engine)
        except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
            failure = f"{temporary}: cannot be written: {error}; free space and start again, the run goes on"
        self._raise_any(failure)
        failure = None
        try:
            records = self._records(temporary)
        except OSError as error:
            failure = f"{temporary}: cannot be read back: {error}"
            records = {}
        self._raise_any(failure)
        merged = {name: record for part in self.runtime.gather(records) for name, record in part.items()}
        manifest = {
            "step": step,
            "world_size": self.runtime.world_size,
            "zero_stage": zero_stage(engine),
            "state": state,
            "files": merged,
        }
        self.runtime.agree(lambda: self._commit(temporary, final, manifest))

    def load(self, engine: Any) -> dict[str, Any] | None:
        """Restore the newest whole checkpoint into the engine and return its manifest; None when there is none.

        Raises UserError when it was made by another number of ranks or under another ZeRO stage.
        """
        found: tuple[Path, dict[str, Any]] | None = self.runtime.agree(self._newest_whole)
        if found is None:
            return None
        folder, manifest = found
        here = (self.runtime.world_size, zero_stage(engine))
        if (manifest["world_size"], manifest["zero_stage"]) != here:
            raise UserError(
                f"{folder}: made by {manifest['world_size']} ranks under ZeRO {manifest['zero_stage']}, this run has "
                f"{here[0]} under ZeRO {here[1]}; start it as before, or a new run with drafter.init_from={folder}"
            )
        engine.load_checkpoint(str(folder / "deepspeed"), tag=_ENGINE_TAG, load_lr_scheduler_states=False)
        random_state = load_file(folder / self._random_state_name())
        torch.set_rng_state(random_state["cpu"])
        if "cuda" in random_state:
            torch.cuda.set_rng_state(random_state["cuda"])
        return manifest

    # -- writing ------------------------------------------------------------------------------------------------

    def _write(self, folder: Path, engine: Any) -> None:
        engine.save_checkpoint(str(folder / "deepspeed"), tag=_ENGINE_TAG, save_latest=False)
        random_state = {"cpu": torch.get_rng_state()}
        if self.runtime.device.type == "cuda":
            random_state["cuda"] = torch.cuda.get_rng_state()
        save_file(random_state, folder / self._random_state_name())
        weights = _whole_weights(engine)
        if self.runtime.is_first:
            engine.module.model.save_pretrained(folder / MODEL, state_dict=weights)
        self.runtime.barrier()

    def _random_state_name(self) -> str:
        return f"rng-{self.runtime.rank:05d}.safetensors"

    def _records(self, folder: Path) -> dict[str, dict[str, Any]]:
        """Sizes and checksums of this rank's share of the files, each made durable first."""
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        records = {}
        for path in files[self.runtime.rank :: self.runtime.world_size]:
            with path.open("rb") as file:
                os.fsync(file.fileno())
            records[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "xxh64": file_xxh64(path)}
        return records

    def _commit(self, temporary: Path, final: Path, manifest: dict[str, Any]) -> None:
        try:
            write_json(temporary / MANIFEST, manifest)
            if final.exists():
                shutil.rmtree(final)  # torn, or this step would not have been reached again
            temporary.replace(final)
            write_atomically(self.folder / LATEST, [f"{final.name}\n".encode()])
        except (OSError, DataError) as error:
            raise UserError(f"{final}: cannot be committed: {error}; free space and start again") from error
        self._prune()

    def _prune(self) -> None:
        """Keep the newest ones and those of the rule."""
        for folder in committed(self.folder)[: -self.section.keep]:
            step = int(folder.name.removeprefix("step-"))
            if not (self.section.keep_every and step % self.section.keep_every == 0):
                shutil.rmtree(folder)

    def _raise_any(self, failure: str | None) -> None:
        failures = [text for text in self.runtime.gather(failure) if text]
        if failures:
            raise UserError(failures[0])

    # -- finding ------------------------------------------------------------------------------------------------

    def _newest_whole(self) -> tuple[Path, dict[str, Any]] | None:
        for folder in reversed(committed(self.folder)):
            misfits = verify(folder)
            if not misfits:
                return folder, read_json(folder / MANIFEST)
            print(
                f"warning: {folder} is damaged ({'; '.join(misfits[:3])}); going back to the one before",
                file=sys.stderr,
            )
        return None


def _fresh_folder(folder: Path) -> None:
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made: {error.strerror}; free space or choose another run.dir") from error


def _whole_weights(engine: Any) -> dict[str, torch.Tensor] | None:
    """The drafter's weights on rank 0 (under ZeRO-3 gathered from all ranks), named as in its Hugging Face model."""
    gathers = zero_stage(engine) == 3
    whole = engine._zero3_consolidated_16bit_state_dict() if gathers else engine.module.state_dict()
    return {name.removeprefix("model."): weight for name, weight in whole.items()} if whole else None
