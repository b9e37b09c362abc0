"""Whether a drafter can draft for a target: the same ids, and each stands for the same piece."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_shards.errors import DataError
from dist_train.config import TargetSection
from dist_train.config.read import read_yaml
from dist_train.errors import UserError
from dist_train.models.drafter import find_model, read_drafter_config
from dist_train.models.target_tokenizer import named_tokenizer
from dist_train.runtime.run_folder import CONFIG, read_manifest, run_of
from dist_train.runtime.world import tell_once
from dist_train.tokenizer import Tokenizer, load_tokenizer, piece_difference


def check_drafter(path: Path, name: str, vocab_size: int | None, tokenizer: Tokenizer | None) -> Any:
    """The configuration of the drafter at `path`, which a message calls `name`, if it can draft for such a target.

    None: not known yet. Raises UserError where its vocabulary has another size, or its ids stand for other pieces.
    """
    try:
        config = read_drafter_config(path)
    except (UserError, DataError) as error:
        raise UserError(f"{name}: {error}") from error
    if vocab_size is not None and config.vocab_size != vocab_size:
        raise UserError(f"{name}: {path}: a vocabulary of {config.vocab_size}, not the {vocab_size} of this run")
    if tokenizer is not None:
        refuse_other_pieces(path, name, tokenizer)
    return config


def refuse_other_pieces(path: Path, name: str, tokenizer: Tokenizer) -> None:
    """Raise UserError where a drafter's ids stand for other pieces, as far as its run or its folder tells.

    Special tokens may differ: versions of one family rename those that they reserve.
    """
    model = find_model(path)
    run = run_of(model)
    try:
        own = load_tokenizer(model) if run is None else _tokenizer_of_run(run, model, tokenizer)
    except UserError as error:
        if run is not None:  # it had one, and not this
            tell_once(f"{name}: {path}: not compared with {tokenizer.source}: {error}")
        return
    if own.sha256 == tokenizer.sha256:
        return
    special = {*own.special_ids.values()} & {*tokenizer.special_ids.values()}
    if why := piece_difference(own, tokenizer, but=special):
        raise UserError(
            f"{name}: {path}: its tokenizer, {own.source}, is not {tokenizer.source}: {why}; "
            "name a drafter of this tokenizer"
        )


def _tokenizer_of_run(run: Path, model: Path, tokenizer: Tokenizer) -> Tokenizer:
    """What the run was given, if it is still where its configuration says. Raises UserError where it is not.

    By its checksum: a path may lead elsewhere today.
    """
    checksum = read_manifest(model.parent)["state"].get("tokenizer")
    if checksum == tokenizer.sha256:
        return tokenizer
    config = read_yaml(run / CONFIG)
    try:
        target = config.get("target")
        section = TargetSection(path=target["path"], revision=target.get("revision")) if target else None
        source = str(config["tokenizer"])
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{run / CONFIG}: torn or changed; restore it") from error
    own = named_tokenizer(section, source)
    if own.sha256 != checksum:
        raise UserError(f"{own.source} is not what {run} was trained with")
    return own
