"""Conversations that the target answers turn by turn (seeds.turns=regenerate)."""

from __future__ import annotations

import json
from itertools import groupby

import pyarrow.parquet as pq
import pytest
import torch
from generations import files, generation, rows
from runs import run_by
from transformers import AutoModelForCausalLM

from data_shards import ShardedTokens
from data_shards.files import read_json
from dist_train.tokenizer import load_tokenizer

QUESTIONS = ["the drafter guesses", "what comes next", "and the target"]


@pytest.fixture(scope="module")
def conversations(tmp_path_factory):
    """A file of 24 conversations, of three user messages each, of which half begin with a system message."""
    path = tmp_path_factory.mktemp("turns") / "sharegpt.jsonl"
    with path.open("w") as file:
        for number in range(24):
            said = [{"from": "system", "value": "agrees or not"}] if number % 2 else []
            for question in QUESTIONS:
                said += [{"from": "human", "value": f"{question} {number}"}, {"from": "gpt", "value": "the old answer"}]
            file.write(json.dumps({"conversations": said[:-1]}) + "\n")
    return path


def by_turn(tiny, conversations, out, *more):
    seeds = [f"seeds.inputs={conversations}", "seeds.format=chat", "seeds.turns=regenerate", "seeds.limit=null"]
    return generation(tiny, out, *seeds, "max_new_tokens=40", *more)


@pytest.fixture(scope="module")
def undisturbed(tiny, conversations, cli, tmp_path_factory):
    """The outcome of one process."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    told = cli(*by_turn(tiny, conversations, out)).stdout
    return out, told


def test_each_greedy_answer_follows_the_ones_before_it_as_transformers_gives_them(tiny, conversations, undisturbed):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny.target), load_tokenizer(tiny.tokenizer)
    room = model.config.max_position_embeddings
    wanted, reached = [], set()
    for number in range(24):
        messages = [{"role": "system", "content": "agrees or not"}] if number % 2 else []
        for turn, question in enumerate(QUESTIONS, 1):
            messages = [*messages, {"role": "user", "content": f"{question} {number}"}]
            ids = tokenizer.encode_prompt(messages)
            if len(ids) + 40 > room:
                break
            prompt = torch.tensor([ids])
            out = model.generate(prompt, max_new_tokens=40, do_sample=False, pad_token_id=2, eos_token_id=2)
            answer = out[0, len(ids) :].tolist()
            wanted.append((number, turn, messages[-1]["content"], ids, answer))
            reached.add(turn)
            if answer[-1] != 2:
                break
            messages = [*messages, {"role": "assistant", "content": tokenizer.decode(answer)}]
    names = ("seed", "turn", "prompt", "prompt_ids", "response_ids")
    greedy = [tuple(row[name] for name in names) for row in rows(undisturbed[0]) if row["temperature"] == 0]
    assert sorted(greedy) == sorted(wanted)
    assert reached == {1, 2, 3}


def test_a_unit_holds_its_first_turns_first_and_each_sampled_answer_goes_on_from_its_own(tiny, undisturbed):
    tokenizer = load_tokenizer(tiny.tokenizer)
    for path in sorted(undisturbed[0].glob("unit-*.parquet")):
        found = pq.read_table(path).to_pylist()
        assert [row["turn"] for row in found] == sorted(row["turn"] for row in found)
        for seed, turns in groupby(sorted(found, key=lambda row: row["seed"]), key=lambda row: row["seed"]):
            said = [{"role": "system", "content": "agrees or not"}] if seed % 2 else []
            for number, row in enumerate(turns, 1):
                assert row["turn"] == number
                said.append({"role": "user", "content": row["prompt"]})
                assert row["prompt_ids"] == tokenizer.encode_prompt(said)
                said.append({"role": "assistant", "content": row["response"]})
    seeds = [row["request_seed"] for row in rows(undisturbed[0])]
    assert len(set(seeds)) == len(seeds)


def test_statistics_by_turn(undisturbed):
    out, said = undisturbed
    found, told = rows(out), read_json(out / "_statistics.json")
    for part in told["turns"]:
        mine = [row for row in found if row["turn"] == part["turn"]]
        assert part["answers"] == len(mine)
        assert part["mean_tokens"] == pytest.approx(sum(len(row["response_ids"]) for row in mine) / len(mine))
        assert part["stopped_by_itself"] == pytest.approx(
            sum(row["finish_reason"] == "stop" for row in mine) / len(mine)
        )
    assert told["answers"] + told["unasked"] == 2 * 24 * 3 and told["unasked"] > 0
    assert f"{told['unasked']:,} more were not asked" in said
    assert "By turn of the conversation" in (out / "_statistics.html").read_text()


def test_two_ranks_make_the_same(tiny, conversations, undisturbed, tmp_path):
    run_by(2, *by_turn(tiny, conversations, tmp_path / "out"))
    assert files(tmp_path / "out") == files(undisturbed[0])


def test_a_server_is_asked_turn_by_turn(tiny, here, fake_server, conversations, tmp_path):
    server = fake_server()
    engine = ["engine.kind=openai", f"engine.url={server.url}", "engine.model=tiny"]
    code, _, complaint = here(*by_turn(tiny, conversations, tmp_path / "out", *engine))
    assert code == 0, complaint
    found = rows(tmp_path / "out")
    for row in found:
        ids, reason = server.answer(row["prompt_ids"], row["request_seed"], row["temperature"], 40)
        assert (row["response_ids"], row["finish_reason"]) == (ids, reason)
    assert {row["turn"] for row in found} == {1, 2, 3}
    assert set(server.answered) == {(tuple(row["prompt_ids"]), row["request_seed"]) for row in found}


def test_answers_of_conversations_are_packed_with_the_loss_on_each(tiny, here, undisturbed, tmp_path):
    """As those of single prompts are: a row's response alone bears the loss."""
    out = tmp_path / "packed"
    packing = ["prepare", "format=chat", f"tokenizer={tiny.tokenizer}", f"inputs={undisturbed[0]}", f"out={out}"]
    code, _, complaint = here(*packing, "sequence_length=256")
    assert code == 0, complaint
    corpus = ShardedTokens(out)
    packed = []
    for i in range(corpus.num_documents):
        ids, bears_loss = corpus.document(i), corpus.mask(slice(*corpus.document_range(i))).astype(bool)
        packed.append((ids[~bears_loss].tolist(), ids[bears_loss].tolist()))
    assert sorted(packed) == sorted((row["prompt_ids"], row["response_ids"]) for row in rows(undisturbed[0]))


def test_other_answers_are_another_plan_and_a_tools_answer_is_told(tiny, here, conversations, tmp_path):
    out = tmp_path / "out"
    code, _, complaint = here(*by_turn(tiny, conversations, out, "seeds.limit=2", "temperatures=0"))
    assert code == 0, complaint
    once = by_turn(tiny, conversations, out, "seeds.limit=2", "temperatures=0", "seeds.turns=first")
    assert "holds work that was begun otherwise: prompts" in here(*once)[2]

    messages = [("user", "a"), ("assistant", ""), ("tool", "7"), ("user", "b")]
    tools = tmp_path / "tools.jsonl"
    record = {"messages": [{"role": role, "content": said or "calls"} for role, said in messages]}
    tools.write_text(json.dumps(record) + "\n")
    code, _, complaint = here(*by_turn(tiny, tools, tmp_path / "never", "seeds.prompt_field=messages"))
    assert code == 2 and f"{tools}:1: " in complaint and "a tool's answer" in complaint
