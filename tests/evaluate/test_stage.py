"""`dist-train evaluate`, `generate` and `export` as users start them."""

from __future__ import annotations

import json
import re
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sentencepiece
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from data_shards import ShardedTokens
from data_shards.files import read_json
from dist_train.tokenizer import load_tokenizer


def evaluation(tiny, out, *more):
    return [
        "evaluate",
        f"target.path={tiny.target}",
        "target.precision=fp32",
        f"drafters={{base: {tiny.drafter}, itself: {tiny.target}}}",
        f"tasks=[{{name: chat, inputs: {tiny.chat_lines}, limit: 10}}]",
        f"out={out}",
        "max_new_tokens=12",
        "batch_size=4",
        "gammas=[2, 3]",
        "token_rate.prompts=2",
        "token_rate.repeats=1",
        *more,
    ]


def test_counts_do_not_depend_on_the_number_of_ranks(tiny, cli, command, tmp_path):
    assert command(*evaluation(tiny, tmp_path / "1"))[0] == 0
    cli(*evaluation(tiny, tmp_path / "2"), "--nproc", 2)
    one, two = (read_json(tmp_path / str(ranks) / "results.json") for ranks in (1, 2))
    assert one["rows"] == two["rows"]
    for row in one["rows"]:
        if row["drafter"] == "itself" and row["temperature"] == 0:
            # The target drafting for itself is always right.
            assert row["accepted_histogram"][-1] == row["target_calls"]
            assert row["block_efficiency"]["value"] == row["gamma"] + 1
        assert sum(row["accepted_histogram"]) == row["target_calls"]
        mean = 1 + sum(row["accepted_shares"])  # what servers report: the two agree by definition
        assert row["block_efficiency"]["value"] == pytest.approx(mean)
        assert row["block_efficiency_last_block_cut"] == pytest.approx(row["tokens"] / row["target_calls"])
    conditions = {(row["temperature"], row["drafting"]) for row in one["rows"]}
    assert conditions == {(0.0, "greedy"), (0.6, "sampled"), (0.6, "greedy")}
    rates = {(row["drafter"], row["gamma"]) for row in one["token_rate"]}
    assert rates == {(None, 0)} | {(name, gamma) for name in ("base", "itself") for gamma in (2, 3)}
    assert all(row["batch_size"] == 1 for row in one["token_rate"])
    said = (tmp_path / "1" / "results.md").read_text()
    assert "itself - base" in said and "| chat | 3     | 0.6 | sampled  | base" in said
    page = (tmp_path / "1" / "results.html").read_text()
    assert page.count("<svg") == 1 + 2 * 2  # bars; histogram and positions at each temperature
    assert not re.search(r"<script|<link|@import|(src|href)=.(?!#)|url\((?!#)", page), "the page must stand alone"
    # Two halves of one evaluation, by the command that compares: the same differences from the same counts.
    halves = ["--compare", f"{tmp_path}/1:base", f"{tmp_path}/2:itself"]
    assert command("evaluate", f"out={tmp_path / 'both'}", *halves)[0] == 0
    both = read_json(tmp_path / "both" / "comparison.json")["comparisons"]
    assert [row["difference"] for row in both] == [row["difference"] for row in one["comparisons"]]


def test_dry_run_estimates_memory(tiny, command, tmp_path):
    """Weights by the files themselves: fp32 takes 4 bytes a parameter."""
    code, said, _ = command(*evaluation(tiny, tmp_path / "out"), "--dry-run")
    assert code == 0 and not (tmp_path / "out").exists()
    models = [AutoModelForCausalLM.from_pretrained(path) for path in (tiny.target, tiny.drafter, tiny.target)]
    expected = sum(4 * model.num_parameters() for model in models) / 2**30
    assert f"weights            {expected:8.2f} GiB" in said
    from dist_train.models.kv_cache import as_argument
    from dist_train.models.sizes import cached, parameters

    assert parameters(models[0].config) == models[0].num_parameters()
    seen = DynamicCache(config=models[0].config)
    models[0](torch.tensor([[1, 2, 3]]), use_cache=True, **as_argument(seen, models[0]))
    assert 3 * cached(models[0].config) == sum(layer.keys.numel() + layer.values.numel() for layer in seen.layers)


def test_an_evaluation_goes_on_with_missing_units(tiny, command, refused, tmp_path):
    """However drafters and tasks are ordered. Another seed, other weights in one place: refused by name."""
    target, drafter = (shutil.copytree(tiny.root / name, tmp_path / name) for name in ("target", "drafter"))
    tasks = [f"{{name: {name}, inputs: {tiny.chat_lines}, limit: {limit}}}" for name, limit in (("a", 3), ("b", 5))]
    drafters = [f"base: {drafter}", f"itself: {target}"]
    short = [f"target.path={target}", "temperatures=[0]", "gammas=[2]", "token_rate.prompts=0"]

    def words(order, *more):
        named = [f"drafters={{{', '.join(drafters[::order])}}}", f"tasks=[{', '.join(tasks[::order])}]"]
        return evaluation(tiny, tmp_path / "out", *short, *named, *more)

    def figures():
        rows = read_json(tmp_path / "out" / "results.json")["rows"]
        return {(row["task"], row["drafter"]): (row["prompts"], row["accepted_histogram"]) for row in rows}

    assert command(*words(1))[0] == 0
    before, units = figures(), sorted((tmp_path / "out" / "units").glob("unit-*.json"))
    untouched = units[0].stat().st_mtime_ns
    units[1].unlink()
    assert command(*words(-1))[0] == 0
    assert units[0].stat().st_mtime_ns == untouched
    assert figures() == before and before["a", "base"] != before["a", "itself"]
    units[2].write_bytes(units[2].read_bytes()[:-9])
    assert f"{units[2]}: torn or changed; remove it" in refused(*words(1))
    units[2].unlink()
    assert command(*words(1))[0] == 0 and figures() == before
    for more in ([], ["--dry-run"]):  # which submit makes too
        assert "holds work that was begun otherwise: seed; " in refused(*words(1, "seed=1"), *more)
    shutil.copytree(tiny.target, drafter, dirs_exist_ok=True)
    assert "begun otherwise: drafter base (config);" in refused(*words(1))
    shutil.copytree(tiny.drafter, drafter, dirs_exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(target)
    model.lm_head.weight.data[7, 5] *= 2  # and be it one number
    model.save_pretrained(target)
    assert "begun otherwise: drafter itself, target;" in refused(*words(1))
    shutil.copytree(tiny.target, target, dirs_exist_ok=True)
    assert command(*words(1, f"target.path={target}/"))[0] == 0
    for path, change, what in (
        (target / "config.json", {"rms_norm_eps": 0.5}, "drafter itself (config), target (config)"),
        (target / "generation_config.json", {"eos_token_id": [2, 9]}, "target (generation)"),
        (drafter / "config.json", {"rms_norm_eps": 0.5}, "drafter base (config)"),
    ):
        before = path.read_text()
        path.write_text(json.dumps({**json.loads(before), **change}))
        assert f"begun otherwise: {what};" in refused(*words(1))
        path.write_text(before)


@pytest.mark.parametrize("which", ["drafter", "target"])
@pytest.mark.parametrize("temperature", [0, 0.6])
def test_a_model_that_gives_nan_is_named(tiny, refused, tmp_path, which, temperature):
    broken = AutoModelForCausalLM.from_pretrained(getattr(tiny, which))
    broken.lm_head.weight.data[7] = float("nan")
    broken.save_pretrained(tmp_path / which)
    load_tokenizer(tiny.tokenizer).save(tmp_path / which)
    models = {"target": tiny.target, "drafter": tiny.drafter, which: tmp_path / which}
    told = refused(
        *evaluation(tiny, tmp_path / "out", f"target.path={models['target']}", f"drafters={{a: {models['drafter']}}}"),
        *(f"tokenizer={tiny.tokenizer}", f"temperatures=[{temperature}]", "tasks.0.limit=2"),
    )
    assert re.search(rf"{tmp_path / which}: .*(NaN|not finite)", told)


def generation(tiny, out, *more):
    return [
        "generate",
        f"target.path={tiny.target}",
        "target.precision=fp32",
        f"seeds.inputs={tiny.chat_lines}",
        "seeds.limit=10",
        "temperatures=[0, 1.0]",
        "max_new_tokens=12",
        "batch_size=4",
        f"out={out}",
        *more,
    ]


def answers(folder):
    return pa.concat_tables(pq.read_table(path) for path in sorted(folder.glob("unit-*.parquet"))).to_pylist()


def test_greedy_answers_are_the_targets_own_and_texts_are_their_ids(tiny, command, tmp_path):
    assert command(*generation(tiny, tmp_path / "out", "temperatures=[0]"))[0] == 0
    model = AutoModelForCausalLM.from_pretrained(tiny.target)
    tokenizer = AutoTokenizer.from_pretrained(tiny.target)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tiny.tokenizer / "tokenizer.model"))
    prompts = [json.loads(line)["prompt"] for line in tiny.chat_lines.read_text().splitlines()[:10]]
    for row, prompt in zip(answers(tmp_path / "out"), prompts, strict=True):
        chat = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        assert row["prompt_ids"] == ids
        expected = model.generate(
            torch.tensor([ids]), max_new_tokens=12, do_sample=False, pad_token_id=2, eos_token_id=2
        )
        expected = expected[0, len(ids) :].tolist()
        assert row["response_ids"] == expected
        assert row["finish_reason"] == ("stop" if expected[-1] == 2 else "length")
        assert row["response"] == reference.decode(expected)


def test_answers_are_packed_as_they_were_sampled(tiny, command, tmp_path):
    assert command(*generation(tiny, tmp_path / "out"))[0] == 0
    packing = ["format=chat", f"tokenizer={tiny.tokenizer}", f"out={tmp_path / 'packed'}", "sequence_length=64"]
    assert command("prepare", f"inputs={tmp_path / 'out'}", *packing)[0] == 0
    corpus = ShardedTokens(tmp_path / "packed")
    rows = answers(tmp_path / "out")
    assert [corpus.document(i).tolist() for i in range(corpus.num_documents)] == [
        row["prompt_ids"] + row["response_ids"] for row in rows
    ]


def test_an_exported_drafter_is_loaded_and_encodes_as_sentencepiece(tiny, command, tmp_path):
    code, said, _ = command(
        "export",
        f"drafter={tiny.drafter}",
        f"tokenizer={tiny.tokenizer}",
        f"out={tmp_path / 'out'}",
        f"target.path={tiny.target}",
        "target.precision=fp32",
        f"prompts={{inputs: {tiny.chat_lines}, limit: 3}}",
    )
    assert code == 0 and "gives the target's own greedy output on 3 prompts" in said
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.architectures == ["LlamaForCausalLM"]
    assert model.config.vocab_size == tiny.vocab_size
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tiny.tokenizer / "tokenizer.model"))
    for text in ("two  spaces", " leading", "a\nb", "naïve 日本 🙂", "the model reads"):
        assert tokenizer(text).input_ids == [1, *reference.encode(text)]
        assert tokenizer.decode(reference.encode(text)) == text


def test_mistakes_are_one_line(tiny, refused, other_tokenizer, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=384, **shape)).save_pretrained(tmp_path / "other")
    unlike = shutil.copytree(tiny.drafter, tmp_path / "unlike")
    load_tokenizer(other_tokenizer).save(unlike)
    few = {**shape, "max_position_embeddings": 40}
    LlamaForCausalLM(LlamaConfig(vocab_size=tiny.vocab_size, **few)).save_pretrained(tmp_path / "few")
    exported = ["export", f"drafter={tiny.drafter}", f"out={tmp_path / 'out'}", f"target.path={tiny.target}"]
    prompts = f"prompts={{inputs: {tiny.chat_lines}}}"
    cases = [
        (evaluation(tiny, tmp_path / "out", "max_new_tokens=256"), f"{tiny.target} has 256 positions; a prompt of"),
        (
            evaluation(tiny, tmp_path / "out", f"drafters={{x: {tmp_path / 'few'}}}"),
            "drafter x has 40 positions; a prompt of",
        ),
        (evaluation(tiny, tmp_path / "out", f"drafters={{x: {tmp_path / 'few'}}}"), "set max_tokens=25 in task chat"),
        ([*exported, prompts, "max_new_tokens=250"], "set max_tokens=6 in prompts, or"),
        ([*exported, prompts, f"drafter={tmp_path / 'few'}"], "positions: 40, the target has 256"),
        (evaluation(tiny, tmp_path / "out", "drafters={x: /nowhere}"), "/nowhere: no run, checkpoint or Hugging Face"),
        (evaluation(tiny, tmp_path / "out", f"drafters={{x: {tmp_path / 'other'}}}"), "a vocabulary of 384"),
        (evaluation(tiny, tmp_path / "out", f"drafters={{x: {unlike}}}"), f"drafter x: {unlike}: its tokenizer, "),
        ([*exported, f"drafter={unlike}"], f"drafter: {unlike}: its tokenizer, {unlike}/tokenizer.model, is not "),
        (evaluation(tiny, tmp_path / "out", "tasks=[{name: a, inputs: /nowhere}]"), "/nowhere: no such input file"),
        (evaluation(tiny, tmp_path / "out", f"tokenizer={other_tokenizer}"), f"is not the tokenizer of {tiny.target}"),
        (evaluation(tiny, tmp_path / "out", "tasks.0.prompt_field=question"), "no prompt in 'question'"),
        (generation(tiny, tmp_path / "out", "target.path=/nowhere"), "/nowhere"),
        (
            ["export", f"drafter={tmp_path / 'other'}", f"tokenizer={tiny.tokenizer}", f"out={tmp_path / 'out'}",
             f"target.path={tiny.target}"],
            "the target's vocabulary has 320 entries",
        ),
    ]  # fmt: skip
    for command, message in cases:
        assert message in refused(*command)


@pytest.mark.parametrize("special", ["</s>", "<s>", "[/INST]"])
def test_special_tokens_in_a_users_text_stay_text(tiny, special):
    tokenizer = load_tokenizer(tiny.tokenizer)
    ids = tokenizer.encode_prompt([{"role": "user", "content": f"say {special} now"}])
    assert ids == [1, *tokenizer.encode(f"[INST] say {special} now [/INST]")]
    assert 2 not in ids
    assert ids.count(1) == 1
