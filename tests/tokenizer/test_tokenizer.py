"""Tokenizers: trained with Llama 2's settings, run by sentencepiece, converted so that Hugging Face agrees."""

from __future__ import annotations

import gzip
import json
import random
import shutil

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from transformers import AutoTokenizer, LlamaConfig, Qwen2Config

from dist_train.errors import UserError
from dist_train.tokenizer import PROBES, HuggingFaceTokenizer, differences, load_tokenizer

ALPHABET = "ab the  ▁\t\n01é日🙂.,s"


def random_texts(count, seed=0):
    drawn = random.Random(seed)
    return ["".join(drawn.choice(ALPHABET) for _ in range(drawn.randrange(40))) for _ in range(count)]


def test_trained_model_has_llama_2s_settings(tiny):
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString((tiny.tokenizer / "tokenizer.model").read_bytes())
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    assert trainer.model_type == trainer.BPE
    assert (trainer.byte_fallback, trainer.split_digits, trainer.allow_whitespace_only_pieces) == (True, True, True)
    assert (trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id) == (0, 1, 2, -1)
    assert (normalizer.name, normalizer.add_dummy_prefix, normalizer.remove_extra_whitespaces) == (
        "identity",
        True,
        False,
    )
    assert len(proto.pieces) == tiny.vocab_size
    assert not any("▁" in piece.piece.lstrip("▁") for piece in proto.pieces)


def test_every_text_comes_back(tiny):
    tokenizer = load_tokenizer(tiny.tokenizer)
    for text in [*PROBES, *random_texts(300)]:
        assert tokenizer.decode(tokenizer.encode(text)) == text.replace("▁", " ")


def test_the_conversion_equals_sentencepiece(tiny, tmp_path):
    """Through the files that a server reads; transformers' own conversion fails on double spaces."""
    load_tokenizer(tiny.tokenizer).save(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    converted = AutoTokenizer.from_pretrained(tmp_path)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tiny.tokenizer / "tokenizer.model"))
    texts = [text for text in [*PROBES, *random_texts(3000)] if "<s>" not in text]
    assert converted(texts, add_special_tokens=False).input_ids == reference.encode(texts)


def test_the_conversion_of_llama_2_equals_sentencepiece_on_real_text(shared, tmp_path):
    model = shared / "llama2" / "tokenizer.model"
    load_tokenizer(model).save(tmp_path)
    converted = AutoTokenizer.from_pretrained(tmp_path)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(model))
    with gzip.open(shared / "data" / "instructions.eval.jsonl.gz", "rt") as lines:
        texts = [json.loads(line)["prompt"] for line in lines][:2000]
    assert any("  " in text for text in texts)
    assert converted(texts, add_special_tokens=False).input_ids == reference.encode(texts)
    assert converted("a").input_ids == [1, *reference.encode("a")]


def test_the_check_tells_equal_from_different(tiny, tmp_path, cli):
    from dist_train.tokenizer import train_tokenizer

    load_tokenizer(tiny.tokenizer).save(tmp_path / "saved")
    (tmp_path / "saved" / "tokenizer.model").unlink()
    assert cli("tokenizer", "check", tiny.tokenizer, tmp_path / "saved").stdout.startswith("equal")
    train_tokenizer(["another text with other words entirely, jumping over lazy dogs"] * 50, tmp_path / "other", 300)
    done = cli("tokenizer", "check", tiny.tokenizer, tmp_path / "other", expect=1)
    assert "vocabulary: 320 pieces, 300 pieces" in done.stdout
    assert "ids differ, the first is" in done.stdout
    assert "texts (" in done.stdout


def test_a_conversion_that_merges_spaces_differently_is_found(shared, tmp_path):
    """Two spaces before a word are `▁ ▁word` to sentencepiece; a conversion with its merges out of order joins them."""
    original = load_tokenizer(shared / "llama2" / "tokenizer.model")
    original.save(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    merges = [tuple(merge) for merge in content["model"]["merges"]]
    merges.remove(("▁", "▁"))
    content["model"]["merges"] = [("▁", "▁"), *merges]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    found = differences(original, HuggingFaceTokenizer(str(tmp_path)), PROBES)
    assert any(line.startswith("encoding:") for line in found)


def test_llama_2_chat_is_encoded_as_metas_own_code_does(shared):
    """BOS and the turn as one string: `[INST] text [/INST]`, the text stripped."""
    model = shared / "llama2" / "tokenizer.model"
    reference = sentencepiece.SentencePieceProcessor(model_file=str(model))
    found = load_tokenizer(model, chat_template="llama2").encode_prompt(
        [{"role": "user", "content": "  Who are  you?\n"}]
    )
    assert found == [1, *reference.encode("[INST] Who are  you? [/INST]")]


def test_what_is_no_tokenizer_is_named(tiny, tmp_path):
    shutil.copytree(tiny.tokenizer, tmp_path / "torn")
    model = tmp_path / "torn" / "tokenizer.model"
    for content in (b"not a model", b"", model.read_bytes()[:2000]):
        model.write_bytes(content)
        for source in (model, model.parent):
            with pytest.raises(UserError, match=r"torn/tokenizer\.model: not a sentencepiece model"):
                load_tokenizer(source)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: no tokenizer can be loaded"):
        load_tokenizer(tmp_path / "empty")


@pytest.mark.parametrize("model", [True, False])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
def test_a_file_that_holds_no_json_object_is_named(tiny, tmp_path, name, model):
    load_tokenizer(tiny.tokenizer).save(tmp_path)
    if not model:
        (tmp_path / "tokenizer.model").unlink()
    (tmp_path / name).write_text("[1]")
    with pytest.raises(UserError, match=f"/{name}: not a JSON object but a list; fetch"):
        load_tokenizer(tmp_path)


def test_the_check_compares_flags(tiny, tmp_path, cli):
    load_tokenizer(tiny.tokenizer).save(tmp_path / "b")
    config = json.loads((tmp_path / "b" / "tokenizer_config.json").read_text())
    (tmp_path / "b" / "tokenizer_config.json").write_text(json.dumps({**config, "add_bos_token": False}))
    done = cli("tokenizer", "check", tiny.tokenizer, tmp_path / "b", expect=1)
    assert "adds_bos: True, False" in done.stdout


def test_the_check_reads_given_texts(tiny, tmp_path, cli):
    load_tokenizer(tiny.tokenizer).save(tmp_path / "b")
    (tmp_path / "b" / "tokenizer.model").unlink()
    (tmp_path / "texts.txt").write_text("the model\nreads a token\n")
    done = cli("tokenizer", "check", tiny.tokenizer, tmp_path / "b", "--texts", tmp_path / "texts.txt")
    assert "equal: " in done.stdout


def test_a_folder_whose_own_conversion_differs_is_noted(shared, tmp_path, cli):
    """As transformers itself converts Llama 2's model."""
    from transformers import LlamaTokenizer

    model = shared / "llama2" / "tokenizer.model"
    (tmp_path / "tokenizer.model").write_bytes(model.read_bytes())
    LlamaTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(model.read_bytes())
    done = cli("tokenizer", "check", model, tmp_path)
    assert "equal: " in done.stdout
    assert "tokenizer.json encodes unlike tokenizer.model" in done.stdout


def test_a_hub_id_is_read_at_its_revision(tiny, monkeypatch):
    import huggingface_hub

    asked = {}

    def download(name, revision, **_):
        asked[name] = revision
        return str(tiny.tokenizer)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert load_tokenizer("some/model", "abc").vocab_size == tiny.vocab_size
    assert asked == {"some/model": "abc"}


def test_a_folder_without_a_tokenizer_is_no_tokenizer(tmp_path):
    """transformers makes one of no pieces for some families."""
    for config, why in (
        (
            Qwen2Config(),
            r"no tokenizer in it: none of merges\.txt, tokenizer\.json, vocab\.json; put tokenizer\.json or",
        ),
        (LlamaConfig(), r"no tokenizer can be loaded from it: .*[a-z]; put tokenizer\.json or tokenizer\.model there"),
    ):
        config.save_pretrained(tmp_path)
        with pytest.raises(UserError, match=why):
            load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"no tokenizer can be loaded from it: .*; put tokenizer"):
        load_tokenizer(tmp_path)
