"""Figures of training against their definitions: simulated block efficiency, operations, spikes; on-policy data."""

from __future__ import annotations

import math
from functools import wraps

import numpy as np
import pytest
import torch
from runs import arguments, distillation, figures, losses, run_by

from dist_train.errors import UserError


def test_block_efficiency_is_that_of_every_window_counted_by_hand():
    from dist_train.train.held_out import block_efficiency

    rng = np.random.default_rng(0)
    accepted, mask = rng.random((3, 20)), rng.random((3, 20)) < 0.8
    positions = np.concatenate([np.arange(8), np.arange(12)])[None].repeat(3, 0)
    for gamma in (1, 3, 5):
        total = count = 0.0
        for row in range(3):
            for start in range(20 - gamma + 1):
                window = range(start, start + gamma)
                if all(mask[row, t] for t in window) and not any(positions[row, t] == 0 for t in window[1:]):
                    total += 1 + sum(math.prod(accepted[row, start : start + k]) for k in range(1, gamma + 1))
                    count += 1
        found = block_efficiency(*map(torch.from_numpy, (accepted, mask, positions)), gamma)
        assert found == pytest.approx((total, count), rel=1e-12)


def test_held_out_figures_do_not_depend_on_ranks_and_are_those_of_whole_logits(tiny, tmp_path):
    from transformers import AutoModelForCausalLM

    from data_shards import ShardedTokens

    options = [
        f"target.path={tiny.target}",
        "target.precision=fp32",
        *tiny.data("chats"),
        "objective={kld: 1.0}",
        f"held_out={{path: {tiny.corpus}, every: 2, sequences: 8, gammas: [2]}}",
    ]
    found = {}
    for ranks, micro_batch in ((1, 4), (2, 2)):
        run = tmp_path / str(ranks)
        keys = arguments(tiny, run, *options, f"train.micro_batch={micro_batch}", steps=2)
        run_by(ranks, "pretrain", *keys)
        found[ranks] = {tag: value for tag, value in figures(run)[-1].items() if tag.startswith("eval/")}
    assert found[1] == pytest.approx(found[2], rel=1e-4)

    from data_shards import Source, TokenLoader

    loader = TokenLoader(
        [Source(ShardedTokens(tiny.corpus))], sequence_length=32, global_batch=8, micro_batch=8, seed=0
    )
    (batch,) = loader.step(0)
    ids, labels = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.labels)
    newest = tmp_path / "1" / "checkpoints" / "step-00000002" / "model"
    with torch.no_grad():
        p, q = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(ids).logits.double().softmax(-1)
            for path in (newest, tiny.target)
        )
    assert found[1]["eval/acceptance"] == pytest.approx(float(torch.minimum(p, q).sum(-1).mean()), rel=1e-4)
    a = (p / q).gather(2, labels[..., None])[..., 0].clamp(max=1)
    expected = float((1 + a[:, :-1] + a[:, :-1] * a[:, 1:]).mean())
    assert found[1]["eval/block_efficiency/gamma2"] == pytest.approx(expected, rel=1e-4)


def test_operations_are_those_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaConfig, LlamaForCausalLM

    from dist_train.models.sizes import matrix_parameters
    from dist_train.train.timing import flops_per_token

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=512, **sizes, attn_implementation="eager")
    model = LlamaForCausalLM(config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(2, 48, dtype=torch.long))
    # Eager attention multiplies what is masked too: twice the attention that counts.
    attention = 2 * 3 * 48 * 64
    expected = counter.get_total_flops() / (2 * 48) - attention
    # Rotary frequencies are a product of a few numbers.
    assert flops_per_token(config, matrix_parameters(model), 48) == pytest.approx(expected, rel=1e-2)


class TestLossGuard:
    def guard(self, **options):
        from dist_train.train.left_out import LossGuard

        return LossGuard(max_skipped=3, device=torch.device("cpu"), **{"skip_spikes": False, **options})

    def judged(self, guard, loss):
        """Whether the step is left out, and whether its loss is a spike."""
        return tuple(bool(verdict) for verdict in guard.judge(torch.tensor(float(loss), dtype=torch.float64)))

    def test_a_spike_is_told_and_left_out_only_if_asked(self):
        rng = np.random.default_rng(0)
        for skip in (False, True):
            guard = self.guard(skip_spikes=skip)
            assert {self.judged(guard, 2 + 0.1 * loss) for loss in rng.standard_normal(100)} == {(False, False)}
            assert self.judged(guard, 4.0) == (skip, True)

    def test_it_goes_on_as_if_not_interrupted(self):
        first, second = self.guard(skip_spikes=True), self.guard(skip_spikes=True)
        for loss in np.linspace(3, 2, 60):
            self.judged(first, loss)
        second.load_state_dict(first.state_dict())
        for loss in (2.1, 9.0, 2.0, math.nan):
            assert self.judged(first, loss) == self.judged(second, loss)

    def test_steps_left_out_one_after_the_other_end_the_run(self):
        guard = self.guard()
        for step, applied in enumerate([False, False, True, False, False], start=1):
            guard.count(applied=applied, spike=False, loss=math.nan, step=step, samples="samples 0 to 7 of the order")
        with pytest.raises(UserError, match="step 6: the gradient is not finite, and 3 steps in a row were left out"):
            guard.count(applied=False, spike=False, loss=2.0, step=6, samples="samples 40 to 47 of the order")


class TestOnPolicy:
    def written(self, share, tiny, number=0):
        from transformers import AutoModelForCausalLM

        from dist_train.config import OnPolicySection
        from dist_train.models.attention import Documents
        from dist_train.models.drafter import TrainableDrafter
        from dist_train.train.batch import DeviceBatch
        from dist_train.train.on_policy import OnPolicy

        rng = np.random.default_rng(1)
        tokens = torch.from_numpy(rng.integers(3, 320, (4, 25)))
        positions = torch.cat([torch.arange(9), torch.arange(15)]).expand(4, -1)
        mask = (positions >= 4) & (positions < 12)
        batch = DeviceBatch(
            tokens[:, :-1], tokens[:, 1:], mask, positions, Documents.of_device(positions), int(mask.sum())
        )
        drafter = TrainableDrafter(AutoModelForCausalLM.from_pretrained(tiny.drafter, dtype=torch.float32))
        section = OnPolicySection(share=share, temperature=1e-4)
        return batch, OnPolicy(section, 3, lambda passes: [passes]).rewrite(drafter, batch, number)

    def test_responses_are_what_the_drafter_says_and_prompts_stay(self, tiny):
        """At a temperature of nearly 0 it says its likeliest token, given only its own document."""
        from transformers import AutoModelForCausalLM

        before, after = self.written(1.0, tiny)
        assert after.labels[~before.mask].equal(before.labels[~before.mask])
        model = AutoModelForCausalLM.from_pretrained(tiny.drafter, dtype=torch.float32)
        for document in (slice(0, 9), slice(9, 24)):
            with torch.no_grad():
                likeliest = model(after.input_ids[:, document]).logits.argmax(-1)
            mask = before.mask[:, document]
            assert after.labels[:, document][mask].equal(likeliest[mask])
        for t in range(1, 24):
            if t != 9:  # each token is what the label before it says, within a document
                assert after.input_ids[:, t].equal(after.labels[:, t - 1])

    def test_a_share_is_rewritten_and_the_number_decides_which(self, tiny):
        before, after = self.written(0.5, tiny)
        changed = (after.labels != before.labels).any(1)
        assert 0 < changed.sum() < 4
        assert self.written(0.5, tiny)[1].labels.equal(after.labels)
        assert not self.written(0.5, tiny, number=1)[1].labels.equal(after.labels)

    def test_only_chosen_documents_go_through_the_drafter_from_their_first_response_on(self, tiny, monkeypatch):
        from transformers import LlamaForCausalLM

        shapes = []
        whole = LlamaForCausalLM.forward

        @wraps(whole)
        def noted(model, **given):
            shapes.append(tuple(given["input_ids"].shape))
            return whole(model, **given)

        monkeypatch.setattr(LlamaForCausalLM, "forward", noted)
        before, after = self.written(0.5, tiny)
        documents = 2 * int((after.labels != before.labels).any(1).sum())
        # Four tokens of prompt at once; then the longer response, of 8 tokens, from the token before it on.
        assert shapes == [(documents, 4), *[(documents, 1)] * 8]

    def test_a_run_with_it_trains_the_same_at_every_number_of_ranks(self, tiny, tmp_path):
        """With sharded weights, too, for which ranks take every pass together, also those with nothing to write."""
        options = ("on_policy={share: 0.3, every: 2}", "train.micro_batch=2")
        for name, ranks, stage in (("one", 1, "zero0"), ("two", 2, "zero0"), ("sharded", 2, "zero3")):
            run_by(ranks, *distillation(tiny, tmp_path / name, *options, f"train.deepspeed={stage}"))
        for name in ("two", "sharded"):
            assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
