"""A random target and a drafter that guesses it often and not always; and where the real servers are."""

from __future__ import annotations

import pytest
from served_pair import END, NEW_TOKENS, PROMPTS, Pair, named, random_target


@pytest.fixture(scope="session")
def vllm_python():
    return named("DIST_TRAIN_VLLM_PYTHON")


@pytest.fixture(scope="session")
def llama_cpp():
    return named("DIST_TRAIN_LLAMA_CPP")


@pytest.fixture(scope="session")
def pair(tiny, tmp_path_factory):
    import torch
    from transformers import LlamaForCausalLM

    from dist_train.cli import main
    from dist_train.tokenizer import load_tokenizer

    root = tmp_path_factory.mktemp("served")
    target = random_target(tiny.vocab_size)
    tokenizer = load_tokenizer(tiny.tokenizer)
    target.save_pretrained(root / "target")
    tokenizer.save(root / "target")
    prompts = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in PROMPTS]
    greedy = []
    for ids in prompts:
        given = torch.tensor([ids])
        mask = torch.ones_like(given)
        answer = target.generate(
            given, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=END, eos_token_id=END
        )
        greedy.append(answer[0, len(ids) :].tolist())
    assert all(answer[0] != END for answer in greedy)
    drafter = LlamaForCausalLM(target.config).eval()
    with torch.no_grad():
        for mine, given in zip(drafter.parameters(), target.parameters(), strict=True):
            mine.copy_(given + 0.01 * torch.randn_like(given))
    drafter.save_pretrained(root / "drafter")
    exported = root / "exported"
    words = [f"drafter={root / 'drafter'}", f"target.path={root / 'target'}", f"out={exported}", "dtype=fp32"]
    assert main(["export", *words]) == 0
    return Pair(root / "target", exported, target, drafter, prompts, greedy)
