"""Generation that is killed, shared out, out of disk: the same answers come out, each once."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from generations import files, generation, rows
from runs import on_ranks, run_by
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from data_shards.files import read_json
from dist_train.generate.answers import read_origin


@pytest.fixture(scope="module")
def undisturbed(tiny, cli, tmp_path_factory):
    """The outcome of one process that nothing happens to."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    cli(*generation(tiny, out))
    return out


def test_greedy_answers_are_those_of_transformers_alone(tiny, undisturbed):
    """Each prompt by itself, without the padding of a batch."""
    model = AutoModelForCausalLM.from_pretrained(tiny.target)
    found = rows(undisturbed)
    assert [(row["temperature"], row["seed"]) for row in found] == [(t, seed) for t in (0, 1) for seed in range(60)]
    for row in found[:60]:
        ids = torch.tensor([row["prompt_ids"]])
        out = model.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=2, eos_token_id=2)
        assert row["response_ids"] == out[0, ids.shape[1] :].tolist()
        assert row["finish_reason"] == ("stop" if row["response_ids"][-1] == 2 else "length")


def test_what_is_said_beside_the_answers(tiny, undisturbed):
    found, told = rows(undisturbed), read_json(undisturbed / "_statistics.json")
    lengths = sorted(len(row["response_ids"]) for row in found)
    assert (told["answers"], told["tokens"], told["longest"]) == (120, sum(lengths), lengths[-1])
    assert told["distinct"] == pytest.approx(len({row["response"] for row in found}) / 120)
    for heat, part in zip((0, 1), told["conditions"], strict=True):
        mine = [row for row in found if row["temperature"] == heat]
        assert part["answers"] == sum(part["histogram"]) == len(mine) == 60
        assert part["tokens"] == sum(len(row["response_ids"]) for row in mine)
        assert part["median_tokens"] == sorted(len(row["response_ids"]) for row in mine)[29]
        assert part["stopped_by_itself"] == pytest.approx(sum(row["finish_reason"] == "stop" for row in mine) / 60)
        assert part["repeated_to_a_prompt"] == 0  # each prompt once at each temperature
        assert part["tokens_per_s"] > 0
    page = (undisturbed / "_statistics.html").read_text()
    assert "<svg" in page and "T = 0, greedy" in page and "T = 1, top-p 0.95" in page
    assert read_json(undisturbed / "_complete.json")["answers"] == 120
    origin = read_origin(undisturbed / "unit-000000.parquet")
    assert origin["target"]["path"] == str(tiny.target) and origin["engine"] == "transformers"


SLOW_RANK = """
import os, sys, time
from dist_train.generate import local
answer = local.LocalEngine.answer
def slow(self, *arguments):
    time.sleep(1.5 if os.environ["RANK"] == "1" else 0)
    return answer(self, *arguments)
local.LocalEngine.answer = slow
from dist_train.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_ranks_makes_the_same_and_waits_for_no_slow_one(tiny, undisturbed, tmp_path, ranks):
    on_ranks(SLOW_RANK, ranks, *generation(tiny, tmp_path / "out"))
    assert files(tmp_path / "out") == files(undisturbed)
    shares = [len(path.read_text().splitlines()) for path in (tmp_path / "out").glob("_times-*.jsonl")]
    assert sum(shares) == 30 and len(shares) == ranks
    assert min(shares) <= 5  # an equal share would be 10 or 15, and 15 or 22 seconds


def killed(command, ranks, seconds_after_first, folder):
    """Start it, and kill all its processes some time after its first new unit; False if it ended before."""
    before = len(files(folder)) if folder.exists() else 0
    line = [sys.executable, "-m", "dist_train", *command, *(["--nproc", str(ranks)] if ranks > 1 else [])]
    process = subprocess.Popen(line, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while process.poll() is None and not (folder.exists() and len(list(folder.glob("unit-*.parquet"))) > before):
        time.sleep(0.005)
    time.sleep(seconds_after_first)
    ended = process.poll() is not None
    if not ended:
        os.killpg(process.pid, signal.SIGKILL)
    complaint = process.communicate(timeout=60)[1].decode()
    assert not ended or process.returncode == 0, complaint
    return not ended


def series(tiny, undisturbed, folder, kills, drawn):
    """Kill it so many times, with a random number of ranks; how many units there were after each."""
    counts = []
    while len(counts) < kills:
        if killed(generation(tiny, folder), drawn.randint(1, 3), drawn.uniform(0, 0.15), folder):
            counts.append(len(files(folder)))
            assert not (folder / "_complete.json").exists() or counts[-1] == 30
        else:  # all done: take half of it away again
            for path in drawn.sample(sorted(folder.glob("unit-*.parquet")), 15):
                path.unlink()
    run_by(drawn.randint(2, 3), *generation(tiny, folder))
    assert files(folder) == files(undisturbed)
    answered = [(row["temperature"], row["seed"]) for row in rows(folder)]
    assert len(set(answered)) == len(answered) == 120
    assert read_json(folder / "_complete.json")["answers"] == 120
    assert not list(folder.glob("_claim-*"))
    return counts


def test_a_killed_generation_goes_on(tiny, undisturbed, tmp_path):
    out = tmp_path / "out"
    counts = series(tiny, undisturbed, out, 2, random.Random(1))
    assert 0 < counts[0] < 30


def test_ctrl_c_drops_the_units_under_way_and_the_same_command_goes_on(tiny, fake_server, tmp_path):
    """Decoding here, and of a server that fails and is asked again for ten minutes; a second one changes nothing."""
    busy = fake_server(stuck="[INST]")  # takes the first token that it is asked for, and no more
    server = ["engine.kind=openai", f"engine.url={busy.url}", "engine.model=tiny"]
    long = ["max_new_tokens=200", "seeds.limit=200", "temperatures=[0, 1]"]
    started = {}
    for name, options in (("here", long), ("server", server)):
        command = [sys.executable, "-m", "dist_train", *generation(tiny, tmp_path / name, *options)]
        started[name] = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    for name, process in started.items():
        while process.poll() is None and not list(tmp_path.glob(f"{name}/_claim-*")):
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        complaint = process.communicate(timeout=20)[1]
        assert process.returncode == 130, complaint
        assert "goes on with what is missing" in complaint and complaint.count("\n") == 1
        assert not list(tmp_path.glob(f"{name}/_claim-*")) and not (tmp_path / name / "_complete.json").exists()


@pytest.mark.campaign
def test_twenty_kills(tiny, undisturbed, tmp_path):
    counts = series(tiny, undisturbed, tmp_path / "out", 20, random.Random(int(os.environ.get("SEED", 0))))
    print(f"units after each of 20 kills: {counts}")


def test_part_of_an_outcome_is_not_packed_and_a_torn_unit_is_named(tiny, here, refused, undisturbed, tmp_path):
    partial = tmp_path / "out"
    shutil.copytree(undisturbed, partial, ignore=shutil.ignore_patterns("_complete.json"))
    packing = ["prepare", "format=chat", f"tokenizer={tiny.tokenizer}", f"out={tmp_path / 'packed'}"]
    assert "its answers are not all there yet" in refused(*packing, f"inputs={partial}")
    torn = partial / "unit-000003.parquet"
    os.truncate(torn, 2000)
    code, _, complaint = here(*generation(tiny, partial))
    assert code == 2 and f"{torn}: damaged" in complaint and "remove it" in complaint
    torn.unlink()
    assert here(*generation(tiny, partial))[0] == 0
    assert files(partial) == files(undisturbed)


def test_a_folder_does_not_get_answers_of_two_targets(tiny, here, tmp_path):
    shutil.copytree(tiny.target, tmp_path / "target")
    again = generation(tiny, tmp_path / "out", f"target.path={tmp_path / 'target'}", "seeds.limit=8", "temperatures=0")
    assert here(*again)[0] == 0
    whole = files(tmp_path / "out")
    weights = load_file(tmp_path / "target" / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][5, 7] *= 1.01
    save_file(weights, tmp_path / "target" / "model.safetensors", {"format": "pt"})
    assert here(*again)[0] == 0 and files(tmp_path / "out") == whole  # nothing is missing
    (tmp_path / "out" / "unit-000001.parquet").unlink()
    code, _, complaint = here(*again)
    assert code == 2 and f"{tmp_path / 'out'}: holds work that was begun otherwise: weights" in complaint
    assert len(files(tmp_path / "out")) == 1
    settings = tmp_path / "target" / "generation_config.json"
    before = settings.read_text()
    settings.write_text(json.dumps({**json.loads(before), "eos_token_id": [2, 50]}))
    assert "holds work that was begun otherwise: target (generation);" in here(*again)[2]
    settings.write_text("[1]")
    assert "generation_config.json cannot be read" in here(*again)[2]
    settings.write_text(before)
    plan = tmp_path / "out" / "_plan.json"
    plan.write_text(plan.read_text()[:-9])
    assert f"; nothing else tells what {tmp_path / 'out'} holds: restore it, or write elsewhere" in here(*again)[2]

    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan  # one that answers nothing
    save_file(weights, tmp_path / "target" / "model.safetensors", {"format": "pt"})
    code, _, complaint = here(*again, f"out={tmp_path / 'never'}")
    assert code == 2 and "the target's logits are not finite" in complaint
    assert not files(tmp_path / "never")


def test_an_answer_depends_on_its_own_seed_alone(tiny, undisturbed):
    """Not on the rows that are decoded at a time, nor on which other prompts are in its unit."""
    from dist_train.generate.asks import Ask, Sampling
    from dist_train.generate.local import LocalEngine

    found = [row for row in rows(undisturbed) if row["temperature"] == 1][:12]
    model = AutoModelForCausalLM.from_pretrained(tiny.target)
    asks = [Ask([], row["prompt_ids"], row["request_seed"]) for row in found]
    for count, some in ((1, slice(0, 12)), (5, slice(0, 12)), (12, slice(0, 12)), (2, slice(7, 10))):
        answers = LocalEngine(model, [2], count).answer(asks[some], Sampling(1.0, 0.95, 24))
        assert [answer.ids for answer in answers] == [row["response_ids"] for row in found[some]]
        assert [answer.finish_reason for answer in answers] == [row["finish_reason"] for row in found[some]]
    assert len({row["response"] for row in found}) == 12


FULL_DISK = """
import os, resource, sys
from dist_train.cli import main
if os.environ.get("RANK", "1") == "1":
    resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
code = main(sys.argv[1:])
sys.stdout.flush(), sys.stderr.flush()
os._exit(code)
"""


def test_a_full_disk_is_told_and_leaves_whole_files(tiny, undisturbed, tmp_path):
    sizes = [len(data) for data in files(undisturbed).values()]
    limit = sorted(sizes)[len(sizes) // 2]
    command = [sys.executable, "-c", FULL_DISK.format(limit=limit), *generation(tiny, tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert "cannot be written: File too large; free space" in done.stderr and done.stderr.count("\n") == 1
    made = files(tmp_path / "out")
    assert made.items() <= files(undisturbed).items()
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_a_fault_of_one_rank_is_told_by_that_rank(tiny, tmp_path):
    """The disk of its node is full, say; rank 0 knows nothing of it."""
    _, second = on_ranks(FULL_DISK.format(limit=1000), 2, *generation(tiny, tmp_path / "out"), check=False)
    assert second.returncode == 2
    assert "dist-train generate: rank 1: " in second.stderr and "cannot be written: File too large" in second.stderr


UNREACHED = """
import os, sys
from dist_train.cli import main
from dist_train.serving.http import Client

made = Client.__init__

def elsewhere(self, url, key, timeout, patience):
    made(self, "http://127.0.0.1:9/v1", key, timeout, 1.0)

if os.environ["RANK"] == "1":  # its node has no way to the server
    Client.__init__ = elsewhere
code = main(sys.argv[1:])
sys.stdout.flush(), sys.stderr.flush()
os._exit(code)
"""


def test_a_server_that_one_rank_does_not_reach_is_told_once_and_nothing_is_begun(tiny, fake_server, tmp_path):
    server = ["engine.kind=openai", f"engine.url={fake_server().url}", "engine.model=tiny"]
    ranks = on_ranks(UNREACHED, 2, *generation(tiny, tmp_path / "out", *server), check=False)
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert "dist-train generate: rank 1: http://127.0.0.1:9/v1: gave up after" in ranks[0].stderr
    assert "".join(rank.stderr for rank in ranks).count("gave up") == 1
    assert not list((tmp_path / "out").iterdir())
