"""Drafters that draft a block in one pass: what they are trained on, against a sequence of its own for each output."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from runs import MIXED, arguments, distillation, figures, losses, run_by, weights
from transformers import LlamaConfig

from data_shards.files import read_json
from dist_train.config import LossSection
from dist_train.config.train import ParallelSection
from dist_train.losses import Head
from dist_train.models.attention import Documents
from dist_train.models.chains import Parallel, lay_out
from dist_train.models.drafter import TrainableDrafter, new_drafter
from dist_train.train.batch import DeviceBatch
from dist_train.train.objective import Objective

VOCAB, MASK, TOKENS, WIDE = 40, 39, 4, 12
PARALLEL = ("drafter.parallel={tokens: 3, keep: 0.8}",)


class Norm(torch.nn.Module):
    """LlamaRMSNorm, which computes in fp32 whatever comes, in the precision that comes."""

    def __init__(self, weight, eps):
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, x):
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()


def exact_drafter(tied=False):
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.4,
        tie_word_embeddings=tied,
    )
    Parallel(TOKENS, MASK).configure(config)
    model = new_drafter(config, 0).double()
    for layer in model.model.layers:
        for name in ("input_layernorm", "post_attention_layernorm"):
            setattr(layer, name, Norm(getattr(layer, name).weight, config.rms_norm_eps))
    model.model.norm = Norm(model.model.norm.weight, config.rms_norm_eps)
    return TrainableDrafter(model)


def packed_batch(keep=1.0):
    """Two rows: two documents and one; what is not an answer is not trained."""
    ids = np.random.default_rng(0).integers(0, MASK, (2, 13))
    positions = np.array([[*range(7), *range(6)], [*range(13)]])
    mask = np.ones((2, 12 + 1), dtype=np.int64)
    mask[0, 6] = mask[:, 12] = mask[1, :3] = mask[1, 8] = 0
    chains = lay_out(ids, positions, mask, Parallel(TOKENS, MASK), keep, (0,))
    labels = np.roll(ids, -1, 1)
    tensors = [torch.from_numpy(array) for array in (ids, labels, mask.astype(bool), positions)]
    documents = Documents.of_host(positions, torch.device("cpu"))
    return DeviceBatch(*tensors, documents, int(mask.sum()), chains)


class Fixed:
    """A target: its head."""

    def __init__(self):
        generator = torch.Generator().manual_seed(1)
        self.head = Head(torch.randn(VOCAB, WIDE, generator=generator, dtype=torch.float64))


def outputs_of(batch):
    """(row, position, offset) of everything that is trained, found from the definition alone."""
    for row in range(len(batch.mask)):
        for t in range(batch.mask.shape[1]):
            for k in range(TOKENS):
                span = range(t, t + k + 1)
                inside = t + k < batch.mask.shape[1] and batch.positions[row, t + k] == batch.positions[row, t] + k
                if inside and all(batch.mask[row, i] for i in span):
                    yield row, t, k


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["kld", "tvd", "tvdpp", "lk", "ce"])
def test_losses_and_gradients_are_those_of_a_sequence_for_each_output(name, tied):
    batch, target, drafter = packed_batch(), Fixed(), exact_drafter(tied)
    states = torch.randn(2, 13, WIDE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    objective = Objective({name: 1.0}, LossSection(), target)
    whole, gathered = batch.unrolled(states)
    loss, _ = drafter(
        whole.input_ids,
        whole.positions,
        objective.loss(whole, gathered, whole.unmasked),
        whole.documents,
        whole.seen,
    )
    loss.backward()
    found = {key: weight.grad.clone() for key, weight in drafter.named_parameters()}
    drafter.zero_grad()

    wanted = list(outputs_of(batch))
    assert len(wanted) == whole.unmasked == batch.trained and {k for *_, k in wanted} == set(range(TOKENS))
    hidden, theirs, labels = [], [], []
    for row, t, k in wanted:
        first = t - int(batch.positions[row, t])
        sequence = torch.tensor([[*batch.input_ids[row, first : t + 1].tolist(), *[MASK] * k]])
        hidden.append(drafter.model.model(input_ids=sequence, use_cache=False).last_hidden_state[0, -1])
        theirs.append(states[row, t + k])
        labels.append(batch.labels[row, t + k])
    alone = DeviceBatch(None, torch.stack(labels), torch.ones(len(wanted), dtype=torch.bool), None, None, len(wanted))
    head = Head(drafter.model.lm_head.weight)
    naive, _ = objective.loss(alone, torch.stack(theirs), len(wanted))(torch.stack(hidden), head)
    naive.backward()
    assert float(loss.detach()) == pytest.approx(float(naive.detach()), abs=1e-12)
    for key, weight in drafter.named_parameters():
        torch.testing.assert_close(found[key], weight.grad, atol=1e-9, rtol=0)


def test_masks_change_nothing_for_the_tokens():
    batch, drafter = packed_batch(), exact_drafter()
    whole, _ = batch.unrolled(None)
    read = {"loss": lambda hidden, head: hidden}
    alone = drafter(batch.input_ids, batch.positions, documents=batch.documents, **read)
    beside = drafter(whole.input_ids, whole.positions, documents=whole.documents, seen=whole.seen, **read)
    torch.testing.assert_close(beside[:, :13], alone, atol=1e-12, rtol=0)


def test_each_place_keeps_its_share_and_chains_have_no_holes():
    length, keep, tokens = 20_000, 0.7, 5
    ids = np.random.default_rng(3).integers(0, 99, (1, length))
    positions, mask = np.arange(length)[None], np.ones((1, length))
    chains = lay_out(ids, positions, mask, Parallel(tokens, 99), keep, (0, 1))
    real = chains.offsets[0] > 0
    anchors, offsets = chains.anchors[0][real], chains.offsets[0][real]
    for offset in range(1, tokens):
        share = float((offsets == offset).sum()) / length
        assert share == pytest.approx(keep**offset, abs=5 * (0.25 / length) ** 0.5)
        assert {*anchors[offsets == offset].tolist()} <= {*anchors[offsets == max(1, offset - 1)].tolist()}
    assert chains.masks == len(anchors)
    section = ParallelSection(tokens=tokens, keep=keep)
    assert 1 + chains.masks / length == pytest.approx(section.positions, rel=0.02)
    # At the eight tokens that drafters are trained for, a step is about three times as long.
    assert ParallelSection(tokens=8).positions < 3.2


def test_what_is_dropped_is_a_rows_own():
    ids = np.random.default_rng(4).integers(0, 99, (3, 50))
    positions, mask = np.tile(np.arange(50), (3, 1)), np.ones((3, 50))
    three = lay_out(ids, positions, mask, Parallel(4, 99), 0.5, (7, 2))
    for row in range(3):
        part = slice(row, row + 1)
        one = lay_out(ids[part], positions[part], mask[part], Parallel(4, 99), 0.5, (7, 2))
        mine = three.offsets[row] > 0
        assert three.anchors[row][mine].tolist() == one.anchors[0][one.offsets[0] > 0].tolist()
    other = lay_out(ids, positions, mask, Parallel(4, 99), 0.5, (7, 3))
    assert other.masks != three.masks or not torch.equal(other.anchors, three.anchors)


@pytest.fixture(scope="module")
def one_rank(tiny, cli, tmp_path_factory):
    run = tmp_path_factory.mktemp("parallel") / "run"
    cli(*distillation(tiny, run, *PARALLEL))
    return run


def test_its_folder_tells_servers_the_mask(one_rank, tiny):
    newest = (one_rank / "checkpoints" / "latest").read_text().strip()
    config = json.loads((one_rank / "checkpoints" / newest / "model" / "config.json").read_text())
    assert config["parallel_tokens"] == 3
    assert config["pard_token"] not in (config["bos_token_id"], config["eos_token_id"])
    assert all(np.isfinite(losses(one_rank)))


@pytest.mark.parametrize("stage", ["zero0", "zero1", "zero2", "zero3"])
def test_two_ranks_have_the_losses_of_one(tiny, tmp_path, one_rank, stage):
    run_by(2, *distillation(tiny, tmp_path / "run", *PARALLEL, f"train.deepspeed={stage}"))
    assert losses(tmp_path / "run") == pytest.approx(losses(one_rank), rel=2e-4)


def test_a_resumed_run_goes_on(tiny, cli, tmp_path):
    constant = [*PARALLEL, "train.schedule=constant"]
    cli(*distillation(tiny, tmp_path / "whole", *constant))
    for steps in (3, 6):
        cli(*distillation(tiny, tmp_path / "run", *constant, steps=steps))
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


def test_a_trained_drafter_learns_to_go_on_so(tiny, cli, refused, tmp_path):
    """PARD's own way, warm-started from one that drafts token by token; no drafter forgets how to unasked."""
    cli(*distillation(tiny, tmp_path / "one"))
    cli(*distillation(tiny, tmp_path / "two", f"drafter.init_from={tmp_path / 'one'}", *PARALLEL))
    assert "embed_tokens" in "".join(weights(tmp_path / "two"))
    words = distillation(tiny, tmp_path / "three", f"drafter.init_from={tmp_path / 'two'}")
    assert "drafts 3 tokens in one pass" in refused(*words)


def test_a_projected_drafter_may_draft_in_one_pass(tiny, cli, tmp_path):
    cli(*distillation(tiny, tmp_path / "run", *PARALLEL, "drafter.projected=true", "regression.share=0.5"))
    assert all(np.isfinite(losses(tmp_path / "run")))


def test_held_out_figures_are_by_place(tiny, cli, tmp_path):
    held_out = f"held_out={{path: {tiny.chats}, every: 3, sequences: 4, gammas: [2, 3]}}"
    target = [f"target.path={tiny.target}", "target.precision=fp32", *tiny.data("corpus")]
    cli("distill", *arguments(tiny, tmp_path / "run", *target, MIXED, *PARALLEL, held_out))
    last = figures(tmp_path / "run")[-1]
    first, second, third = (last[f"eval/acceptance/place{place}"] for place in (1, 2, 3))
    assert 0 < min(first, second, third) <= 1
    assert 1 < last["eval/block_efficiency/gamma2"] < last["eval/block_efficiency/gamma3"] <= 4


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["drafter.parallel={tokens: 1}"], "drafter.parallel.tokens"),
        (["drafter.parallel={tokens: 3, keep: 0}"], "drafter.parallel.keep"),
        (["drafter.parallel={tokens: 3, mask_id: 5000000}"], "mask_id 5000000: no token"),
        (["drafter.parallel={tokens: 3, mask_id: 100}"], "mask_id 100: a token of texts or chats"),
        ([*PARALLEL, "held_out={path: x, gammas: [4]}"], "held_out.gammas: 4 is more than drafter.parallel.tokens 3"),
        ([*PARALLEL, "drafter.attention=eager"], "drafter.attention eager: takes no mask of chains"),
    ],
)
def test_what_does_not_go_together_is_refused(tiny, refused, tmp_path, words, told):
    assert told in refused(*distillation(tiny, tmp_path / "run", *words))


def test_no_more_is_drafted_than_was_trained(tiny, refused, one_rank, tmp_path):
    words = [f"target.path={tiny.target}", f"drafters={{ours: {one_rank}}}", f"out={tmp_path / 'out'}"]
    tasks = f"tasks=[{{name: chat, inputs: {tiny.chat_lines}, limit: 4}}]"
    assert "drafter ours: drafts at most 3 tokens in its one pass" in refused(
        "evaluate", *words, tasks, "gammas=[3, 5]"
    )


def test_an_evaluation_counts_its_passes(tiny, command, one_rank, tmp_path):
    """MBSU with one pass a block, and its cost beside that of the same drafter's token a pass."""
    out = tmp_path / "out"
    code, _, complaint = command(
        "evaluate",
        f"target.path={tiny.target}",
        f"drafters={{ours: {one_rank}}}",
        f"tasks=[{{name: chat, inputs: {tiny.chat_lines}, limit: 8}}]",
        f"out={out}",
        "temperatures=[0.7]",
        "gammas=[3]",
        "max_new_tokens=12",
        "drafting=[sampled, vllm, llama.cpp]",
        "prediction={seconds: 5, batch_sizes: [1]}",
    )
    assert code == 0, complaint
    found = read_json(out / "results.json")
    ratio = found["drafters"]["ours"]["ratio"]
    passes = {"sampled": 1, "vllm": 1, "llama.cpp": 3}
    for row in found["rows"]:
        expected = row["block_efficiency"]["value"] / (ratio * passes[row["drafting"]] + 1)
        assert row["mbsu"] == pytest.approx(expected)
    (cost,) = found["prediction"]["costs"]
    for row in found["prediction"]["speed_ups"]:
        spent = passes[row["drafting"]] * cost["draft"] + cost["verify"][2]
        assert row["speed_up"][2] == pytest.approx(row["tokens_per_call"][2] / spent)
