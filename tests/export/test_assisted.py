"""The proof by transformers' assisted generation."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from dist_train.config import TargetSection
from dist_train.errors import UserError
from dist_train.export import assisted

PROMPT = [1, 20, 30, 40]


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_it_runs_in_the_targets_precision(tiny, monkeypatch, precision, dtype):
    loaded = []

    def load(section, device=None, **how):
        loaded.append(assisted_load(section, **how))
        return loaded[-1]

    assisted_load = assisted.load_causal_lm
    monkeypatch.setattr(assisted, "load_causal_lm", load)
    target = TargetSection(path=str(tiny.target), precision=precision)
    proof = assisted.check_assisted_generation(tiny.drafter, target, [PROMPT, PROMPT[:2]], [2], 8)
    assert loaded[0].dtype == dtype
    assert proof.tokens > 0


def test_answers_may_part_where_the_target_is_undecided_and_nowhere_else(tiny, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(tiny.target)
    likeliest = model(input_ids=torch.tensor([PROMPT])).logits[0, -1].argsort(descending=True).tolist()
    first, second, last = likeliest[0], likeliest[1], likeliest[-1]
    with torch.no_grad():
        model.lm_head.weight[second] = model.lm_head.weight[first]  # exactly as likely
    assert assisted._is_tie(model, [*PROMPT, first, 7], [*PROMPT, second, 9], len(PROMPT))
    assert not assisted._is_tie(model, [*PROMPT, first], [*PROMPT, last], len(PROMPT))
    assert not assisted._is_tie(model, PROMPT, [*PROMPT, first], len(PROMPT))

    class Wrong:
        """Its assisted answer is another than its own."""

        device = model.device

        def to(self, _device):
            return self

        def __call__(self, **inputs):
            return model(**inputs)

        def generate(self, ids, assistant_model=None, **_options):
            return torch.cat([ids, torch.tensor([[last if assistant_model else first]])], 1)

    monkeypatch.setattr(assisted, "load_causal_lm", lambda section, device: Wrong())
    target = TargetSection(path=str(tiny.target), precision="fp32")
    with pytest.raises(UserError, match="prompt 0 gets another greedy answer"):
        assisted.check_assisted_generation(tiny.drafter, target, [PROMPT], [2], 8)
    last = second
    assert assisted.check_assisted_generation(tiny.drafter, target, [PROMPT], [2], 8) == (0, 1)
