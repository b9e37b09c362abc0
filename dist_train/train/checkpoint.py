"""Checkpoints that exist whole or not at all, and that any number of ranks under any ZeRO stage can go on from.

    RUN/checkpoints/step-00000500/   model/       the drafter as a Hugging Face folder, fp32: weights of this run, and
                                                  ready to warm-start, evaluate or export from
                                     ema/         the same of the averaged weights, with train.ema_decay
                                     optimizer-*.safetensors   AdamW's moments, by parameter
                                     rng-00000.safetensors     random state of each rank
                                     manifest.json             written last: what this is, size and xxh64 of every file
    RUN/checkpoints/latest           the name of the newest one, moved atomically

A checkpoint is written as step-N.tmp and renamed once its manifest is on disk; a folder without a manifest does not
exist. A torn newest one is passed over, loudly, for the one before. Training stops only while the state is copied to
the host; a thread of each rank writes, and the ranks commit together at the first step boundary at which all are done.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from data_shards import DataError
from data_shards.files import file_xxh64, write_atomically, write_json
from dist_train.config import CheckpointSection
from dist_train.errors import UserError
from dist_train.models.drafter import answers_end
from dist_train.runtime.process_group import Runtime
from dist_train.runtime.run_folder import CHECKPOINTS, LATEST, MANIFEST, MODEL, committed, read_manifest, verify
from dist_train.train.lease import Lease
from dist_train.train.state import EMA, WEIGHT, DrafterState

_FOLDERS = {WEIGHT: MODEL, EMA: "ema"}  # the others are the optimizer's


@dataclass
class _Pending:
    """A checkpoint that is being written: its folders, its manifest so far, and this rank's part of the work."""

    temporary: Path
    final: Path
    manifest: dict[str, Any]
    written: Future[dict[str, dict[str, Any]]]


class Checkpoints:
    """The checkpoints of one run. `save`, `commit` and `load` are collective."""

    def __init__(self, run: Path, section: CheckpointSection, runtime: Runtime, lease: Lease) -> None:
        self.folder, self.section, self.runtime, self.lease = run / CHECKPOINTS, section, runtime, lease
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: _Pending | None = None

    def due(self, step: int, last_step: int) -> bool:
        """Whether to save after `step` steps."""
        return step == last_step or step % self.section.every == 0

    def save(self, step: int, model: Any, drafter: DrafterState, state: dict[str, Any]) -> None:
        """Begin to write the run as it is after `step` steps; `state` is JSON and comes back from `load`.

        Raises UserError, on all ranks, when the one before could not be written, or the disk is full.
        """
        self.commit()
        final = self.folder / f"step-{step:08d}"
        temporary = final.with_name(f"{final.name}.tmp")
        self.runtime.agree(lambda: self._begin(temporary, _folders(drafter).values()))
        parts = share_out(drafter, self.runtime.world_size)
        files = self._snapshot(temporary, drafter, parts)
        describe = partial(_describe, temporary, model, drafter, parts)
        manifest = {
            "step": step,
            "world_size": self.runtime.world_size,
            "updates": drafter.updates,
            "state": state,
        }
        written = self._writer.submit(self._write, temporary, files, describe)
        self._pending = _Pending(temporary, final, manifest, written)
        if not self.section.asynchronous:
            self.commit()

    @property
    def written(self) -> bool:
        """Whether this rank has something to commit and has written its part, or failed to."""
        return self._pending is not None and self._pending.written.done()

    def commit(self) -> None:
        """Wait for what is being written and make it exist; nothing where nothing is.

        Raises UserError, on all ranks, when it could not be written; the checkpoints before stay whole.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        failure, records = None, {}
        try:
            records = pending.written.result()
        except (OSError, SafetensorError) as error:  # safetensors reports a full disk as an error of its own
            failure = f"{pending.temporary}: cannot be written: {error}; free space and start again, the run goes on"
        outcomes = self.runtime.gather((failure, records))
        for failed, _ in outcomes:
            if failed:
                raise UserError(failed)
        files = {name: record for _, part in outcomes for name, record in part.items()}
        self.runtime.agree(lambda: self._commit(pending, {**pending.manifest, "files": dict(sorted(files.items()))}))

    def load(self, drafter: DrafterState) -> dict[str, Any] | None:
        """Restore the newest whole checkpoint and return its manifest; None when there is none.

        Damaged ones after it are set aside, so that they count neither as newest nor as kept. Raises UserError when it
        is of another drafter.
        """
        found = self.newest_whole()
        if found is None:
            return None
        folder, manifest = found
        self.runtime.agree(lambda: self._set_aside_after(folder))
        self.restore(folder, manifest, drafter)
        return manifest

    def newest_whole(self) -> tuple[Path, dict[str, Any]] | None:
        """Folder and manifest of the newest whole checkpoint; None when there is none. Nothing is changed."""
        found: tuple[Path, dict[str, Any]] | None = self.runtime.agree(self._newest_whole)
        return found

    def restore(self, folder: Path, manifest: dict[str, Any], drafter: DrafterState) -> None:
        """Set the drafter's state to what a checkpoint holds. Raises UserError when it is of another drafter."""
        read = set()
        for name, key, tensor in _stored(folder, manifest):
            wanted = drafter.parameters.get(name)
            # Under ZeRO-3 a parameter's own shape is hidden.
            if wanted is None or tuple(getattr(wanted, "ds_shape", wanted.shape)) != tuple(tensor.shape):
                raise UserError(f"{folder}: {name} of {tuple(tensor.shape)} is not in this drafter; see drafter.*")
            if key in drafter.keys:
                drafter.set(name, key, tensor)
                read.add((name, key))
        missing = [name for name in drafter.parameters if (name, WEIGHT) not in read]
        if missing:
            raise UserError(f"{folder}: is of another drafter, which has no {missing[0]}; see drafter.*")
        for name in drafter.parameters:
            if EMA in drafter.moments and (name, EMA) not in read:  # the average begins here
                drafter.set(name, EMA, drafter.get(name, WEIGHT))
        drafter.updates = manifest["updates"]
        self._restore_random_state(folder)

    # -- writing ------------------------------------------------------------------------------------------------

    def _snapshot(self, folder: Path, drafter: DrafterState, parts: list[list[str]]) -> dict[Path, dict[str, Tensor]]:
        """Copies of this rank's part of the state, by the file that each goes to."""
        files: dict[Path, dict[str, Tensor]] = {}
        for part, names in enumerate(parts):
            for name in names:
                for key in drafter.keys:
                    tensor = drafter.get(name, key)
                    if part == self.runtime.rank:
                        path, stored = _place(folder, key, name, part, len(parts))
                        files.setdefault(path, {})[stored] = tensor.to("cpu", torch.float32, copy=True)
        random_state = {"cpu": torch.get_rng_state()}
        if self.runtime.device.type == "cuda":
            random_state["cuda"] = torch.cuda.get_rng_state()
        files[folder / self._random_state_name()] = random_state
        return files

    def _write(
        self, folder: Path, files: dict[Path, dict[str, Tensor]], describe: Callable[[], list[Path]]
    ) -> dict[str, dict[str, Any]]:
        """Write this rank's files; size and checksum of each, and on rank 0 of those that describe the model."""
        for path, tensors in files.items():
            path.touch()
            mode = path.stat().st_mode  # the umask's; safetensors' own is 0600, whatever that says
            save_file(tensors, path, metadata={"format": "pt"})
            path.chmod(mode)
        records = {}
        for path in [*files, *(describe() if self.runtime.is_first else [])]:
            with path.open("rb") as file:
                os.fsync(file.fileno())
            records[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "xxh64": file_xxh64(path)}
        return records

    def _begin(self, temporary: Path, below: Iterable[str]) -> None:
        """Make room for a new checkpoint, unless it is another process by now that writes here."""
        self.lease.check()
        _fresh_folders(temporary, below)

    def _set_aside_after(self, folder: Path) -> None:
        """Rename the damaged checkpoints after `folder`, which the run goes on from."""
        self.lease.check()
        for later in committed(self.folder):
            if later > folder:
                aside = later.with_name(f"{later.name}.damaged")
                shutil.rmtree(aside, ignore_errors=True)
                later.replace(aside)

    def _commit(self, pending: _Pending, manifest: dict[str, Any]) -> None:
        self.lease.check()
        try:
            write_json(pending.temporary / MANIFEST, manifest)
            if pending.final.exists():
                shutil.rmtree(pending.final)  # torn, or this step would not have been reached again
            pending.temporary.replace(pending.final)
            write_atomically(self.folder / LATEST, [f"{pending.final.name}\n".encode()])
        except (OSError, DataError) as error:
            raise UserError(f"{pending.final}: cannot be committed: {error}; free space and start again") from error
        self._prune()

    def _prune(self) -> None:
        """Keep the newest ones and those of the rule."""
        for folder in committed(self.folder)[: -self.section.keep]:
            step = int(folder.name.removeprefix("step-"))
            if not (self.section.keep_every and step % self.section.keep_every == 0):
                shutil.rmtree(folder)

    # -- finding ------------------------------------------------------------------------------------------------

    def _newest_whole(self) -> tuple[Path, dict[str, Any]] | None:
        """Read from the folders themselves: a lost or stale `latest` changes nothing."""
        folders = committed(self.folder)
        for folder in reversed(folders):
            misfits = verify(folder)
            if not misfits:
                return folder, read_manifest(folder)
            print(
                f"warning: {folder} is damaged ({'; '.join(misfits[:3])}); going back to the one before",
                file=sys.stderr,
            )
        if folders:
            raise UserError(
                f"{self.folder}: all {len(folders)} checkpoints are damaged; restore one, or remove them to begin anew"
            )
        return None

    def _random_state_name(self) -> str:
        return f"rng-{self.runtime.rank:05d}.safetensors"

    def _restore_random_state(self, folder: Path) -> None:
        """This rank's; a rank that was not there before keeps the one of its seed."""
        if not (folder / self._random_state_name()).exists():
            return
        random_state = load_file(folder / self._random_state_name())
        torch.set_rng_state(random_state["cpu"])
        if "cuda" in random_state and self.runtime.device.type == "cuda":
            torch.cuda.set_rng_state(random_state["cuda"])


def share_out(drafter: DrafterState, ranks: int) -> list[list[str]]:
    """Which parameters each of the writing ranks writes: nearly equal bytes, no rank without any."""
    sizes = {name: _numel(parameter) for name, parameter in drafter.parameters.items()}
    parts: list[list[str]] = [[] for _ in range(min(ranks, len(sizes)))]
    loads = [0] * len(parts)
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        least = loads.index(min(loads))
        parts[least].append(name)
        loads[least] += sizes[name]
    return parts


def _folders(drafter: DrafterState) -> dict[str, str]:
    """Of what is stored as a Hugging Face folder."""
    return {key: folder for key, folder in _FOLDERS.items() if key in drafter.keys}


def _place(folder: Path, key: str, name: str, part: int, parts: int) -> tuple[Path, str]:
    """The file of a tensor, and its name in there."""
    number = f"{part + 1:05d}-of-{parts:05d}.safetensors"
    if key in _FOLDERS:
        return folder / _FOLDERS[key] / f"model-{number}", name
    return folder / f"optimizer-{number}", f"{key}.{name}"


def _stored(folder: Path, manifest: dict[str, Any]) -> Iterator[tuple[str, str, Tensor]]:
    """(parameter, key, tensor) of all that a checkpoint holds; mapped, so that only what is used is read."""
    folders = {name: key for key, name in _FOLDERS.items()}
    for file in manifest["files"]:
        path = Path(file)
        if path.suffix != ".safetensors" or path.name.startswith("rng-"):
            continue
        with safe_open(folder / path, framework="pt") as tensors:
            for stored in tensors.keys():  # noqa: SIM118, safe_open is no mapping
                key, name = (folders[path.parent.name], stored) if path.parent.name else stored.split(".", 1)
                yield name, key, tensors.get_tensor(stored)


def _describe(folder: Path, model: Any, drafter: DrafterState, parts: list[list[str]]) -> list[Path]:
    """Make Hugging Face folders of the weights' files: configuration, and which file has which weight."""
    size = 4 * sum(_numel(parameter) for parameter in drafter.parameters.values())
    model.config.architectures, model.config.dtype = [type(model).__name__], torch.float32
    made = []
    for key, name in _folders(drafter).items():
        files = {
            parameter: _place(folder, key, parameter, part, len(parts))[0].name
            for part, parameters in enumerate(parts)
            for parameter in parameters
        }
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(files.items()))}
        (folder / name / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
        model.config.save_pretrained(folder / name)
        answers_end(model).save_pretrained(folder / name)
        made += sorted((folder / name).glob("*.json"))
    return made


def _numel(parameter: nn.Parameter) -> int:
    """Elements of the whole parameter, of which ZeRO-3 leaves a rank a part."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _fresh_folders(folder: Path, below: Iterable[str]) -> None:
    try:
        shutil.rmtree(folder, ignore_errors=True)
        for name in below:
            (folder / name).mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made: {error.strerror}; free space or choose another run.dir") from error
