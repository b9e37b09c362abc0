"""The stage: check what cannot be mended, write the folder, put it through the gate, then move it to its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dist_train.config import ExportConfig, SeedsSection, TargetSection
from dist_train.errors import UserError, printable
from dist_train.export.assisted import check_assisted_generation
from dist_train.export.card import Facts, best_gamma, measured, model_card
from dist_train.export.folder import atomic_folder, refuse_foreign, write_marker, write_model
from dist_train.export.gate import Check, gate, source_gate
from dist_train.export.provenance import training_provenance
from dist_train.export.reference import Reference, reference_of_target, reference_of_tokenizer, token_ids
from dist_train.models.chains import parallel_of
from dist_train.models.drafter import damaged_weights, find_model, load_drafter, read_drafter_config
from dist_train.models.load import check_target, read_target_config
from dist_train.models.pairing import refuse_other_pieces
from dist_train.models.target_tokenizer import load_target_tokenizer
from dist_train.prompts.seeds import encoded, read_with_ids, refuse_long
from dist_train.runtime.process_group import quiet_libraries
from dist_train.runtime.version import __version__
from dist_train.serving.gguf import find_converter, write_gguf
from dist_train.tokenizer import load_tokenizer

GGUF_FILE = "drafter.gguf"


def check(config: ExportConfig) -> None:
    """Raise UserError or DataError for what is wrong."""
    if config.check is None:
        _check_export(config, _reference(config))


def run(config: ExportConfig) -> int:
    """Export, or with `check` put an existing folder through the gate: 0, or 1 where it does not pass."""
    quiet_libraries()
    if config.check is not None:
        return _check_folder(config, config.check)
    reference = _reference(config)
    _check_export(config, reference)
    assert config.out is not None  # the configuration asks for it
    with atomic_folder(config.out) as folder:
        _write(config, reference, folder)
    print(f"export: {config.out}", flush=True)
    return 0


def _reference(config: ExportConfig) -> Reference:
    """The target; or the tokenizer where there is no target. Raises UserError where both are named and differ."""
    if config.target is None:
        assert config.tokenizer is not None  # the configuration asks for it
        return reference_of_tokenizer(load_tokenizer(config.tokenizer, chat_template=config.chat_template))
    if config.tokenizer is not None:
        load_target_tokenizer(config.target, config.tokenizer)  # refuses another one
    return reference_of_target(config.target, config.chat_template)


def _check_export(config: ExportConfig, reference: Reference) -> None:
    """What can be told before anything is written."""
    assert config.out is not None
    refuse_foreign(config.out)
    source = find_model(config.drafter)
    if damaged := damaged_weights(source):
        raise UserError(f"{source.parent}: is damaged: {'; '.join(damaged)}; restore it or name another checkpoint")
    training_provenance(config.drafter)
    refuse_other_pieces(config.drafter, "drafter", reference.tokenizer)
    _raise_failed(source, source_gate(source, reference, config.serving_length))
    if config.llama_cpp is not None:
        find_converter(config.llama_cpp)
    if config.results is not None:
        measured(config.results, config.drafter)
    if config.target is not None and config.prompts is not None:
        check_target(config.target)
        _prompts(config.prompts, config.max_new_tokens, config.target, source, reference)


def _check_folder(config: ExportConfig, target: str) -> int:
    """The gate on a folder that is there, one line a check."""
    reference = reference_of_target(TargetSection(path=target), config.chat_template)
    checks = gate(find_model(config.drafter), reference, config.serving_length)
    for one in checks:
        print(printable(str(one)))
    failed = sum(one.verdict == "failed" for one in checks)
    print(
        f"refused: {failed} of {len(checks)} checks failed"
        if failed
        else f"passed: {config.drafter} drafts for {target}"
    )
    return 1 if failed else 0


def _write(config: ExportConfig, reference: Reference, folder: Path) -> None:
    """Everything that goes into the folder. Raises UserError where the gate or a proof does not hold."""
    write_model(find_model(config.drafter), folder, reference, config.dtype)
    checks = gate(folder, reference, config.serving_length)
    _raise_failed(config.drafter, checks)
    for one in checks:
        if one.verdict == "warning":
            print(printable(f"export: warning: {one.name}: {one.text}"), flush=True)
    model: Any = load_drafter(folder)
    print(
        f"export: {model.num_parameters():,} parameters, LlamaForCausalLM, {config.dtype}; "
        f"{len(checks)} checks passed against {reference.source}",
        flush=True,
    )
    assisted = _prove(config, reference, folder)
    if config.gguf:
        _convert(config, folder)
    assert config.out is not None
    provenance = training_provenance(config.drafter)
    facts = Facts(
        name=config.out.resolve().name,
        target=config.target.path if config.target else None,
        parameters=model.num_parameters(),
        dtype=config.dtype,
        positions=model.config.max_position_embeddings,
        longest=reference.max_positions,
        chats=bool(reference.chat_template),
        gamma=best_gamma(config.results, config.drafter) if config.results else None,
        provenance=provenance,
        results=measured(config.results, config.drafter) if config.results else None,
        assisted=assisted,
        gguf=config.outtype if config.gguf else None,
        parallel=parallel_of(model.config),
    )
    (folder / "README.md").write_text(model_card(facts), encoding="utf-8")
    write_marker(folder, {"dist_train": __version__, "dtype": config.dtype, "training": provenance})


def _prove(config: ExportConfig, reference: Reference, folder: Path) -> tuple[int, int] | None:
    """Compare assisted with plain generation where a target and prompts are named: prompts and tokens compared."""
    if config.target is None or config.prompts is None:
        return None
    prompts = _prompts(config.prompts, config.max_new_tokens, config.target, folder, reference)
    eos_ids = token_ids(reference.generation["eos_token_id"]) or [reference.tokenizer.eos_id]
    tokens, ties = check_assisted_generation(folder, config.target, prompts, eos_ids, config.max_new_tokens)
    but = f"; {ties} of them up to a token that rounding decides" if ties else ""
    print(
        f"export: assisted generation gives the target's own greedy output on {len(prompts)} prompts "
        f"({tokens:,} tokens, {config.target.precision}{but})",
        flush=True,
    )
    return len(prompts), tokens


def _prompts(
    section: SeedsSection, max_new_tokens: int, target: TargetSection, drafter: Path, reference: Reference
) -> list[list[int]]:
    """What is to be answered. Raises UserError where target or drafter has too few positions for it."""
    prompts = encoded(read_with_ids(section, reference.tokenizer, key="prompts"), reference.tokenizer.source).ids
    for source, model in ((target.path, read_target_config(target)), ("the drafter", read_drafter_config(drafter))):
        refuse_long(prompts, max_new_tokens, source, model, "max_tokens", " in prompts")
    return prompts


def _convert(config: ExportConfig, folder: Path) -> None:
    assert config.llama_cpp is not None  # the configuration asks for it
    try:
        write_gguf(folder, folder / GGUF_FILE, config.llama_cpp, config.outtype)
    except UserError as error:
        raise UserError(f"{error}; gguf=false leaves it out") from error
    print(f"export: {GGUF_FILE}, {config.outtype}, by llama.cpp's converter", flush=True)


def _raise_failed(folder: Path, checks: list[Check]) -> None:
    failed = [f"{one.name}: {one.text}" for one in checks if one.verdict == "failed"]
    if failed:
        raise UserError(f"{folder}: {'; '.join(failed)}")
