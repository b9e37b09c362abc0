"""How texts begin and end, against what the tokenizer itself adds."""

from __future__ import annotations

import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer

from data_shards.format import Encoding
from dist_train.config import PrepareConfig
from dist_train.prepare.encoders import TextEncoder
from dist_train.tokenizer import load_tokenizer

TEXTS = ["a first text", "another one"]


@pytest.fixture(scope="module")
def chat_family(tmp_path_factory):
    """Makes tokenizers of families whose EOS ends a turn: bytes, and special tokens as they have them."""

    def make(name, special, bos, eos, *, adds_bos=False):
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
        if adds_bos:
            tokenizer.post_processor = processors.TemplateProcessing(
                single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
            )
        folder = tmp_path_factory.mktemp(name)
        tokenizer.save(str(folder / "tokenizer.json"))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        return folder

    return make


SMOLLM2 = (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|im_start|>", "<|im_end|>")
LLAMA3 = (["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"], "<|begin_of_text|>", "<|eot_id|>")
PLAIN = (["<eos>"], None, "<eos>")


def documents(folder, **options):
    """The ids of each text, and how the corpus says that they were made."""
    config = PrepareConfig(inputs="x", out="o", tokenizer=str(folder), **options)
    encoder = TextEncoder(load_tokenizer(folder), config)
    encoded = encoder([{"text": text} for text in TEXTS])
    found, at = [], 0
    for length in encoded.lengths.tolist():
        found.append(encoded.ids[at : at + length].tolist())
        at += length
    return found, encoder.encoding


@pytest.mark.parametrize(
    ("family", "adds_bos", "end"),
    [(SMOLLM2, False, "<|endoftext|>"), (LLAMA3, True, "<|end_of_text|>"), (PLAIN, False, "<eos>")],
)
def test_a_text_is_what_the_tokenizer_makes_of_it_and_an_end(chat_family, family, adds_bos, end):
    folder = chat_family("family", *family, adds_bos=adds_bos)
    reference = AutoTokenizer.from_pretrained(folder)
    end_id = reference.convert_tokens_to_ids(end)
    found, encoding = documents(folder)
    assert found == [[*reference(text).input_ids, end_id] for text in TEXTS]
    assert encoding.bos == adds_bos
    assert (encoding.eos, encoding.separator) == ((True, None) if end == family[2] else (False, end_id))
    assert Encoding(**encoding.as_json()) == encoding


def test_bos_and_eos_by_hand_are_the_tokenizers_own(chat_family):
    folder = chat_family("smol", *SMOLLM2)
    reference = AutoTokenizer.from_pretrained(folder)
    bare = [reference(text).input_ids for text in TEXTS]
    bos, eos = reference.bos_token_id, reference.eos_token_id
    assert documents(folder, bos=True, eos=True)[0] == [[bos, *ids, eos] for ids in bare]
    assert documents(folder, bos=False, eos=False)[0] == bare


def test_texts_for_llama_2_are_between_bos_and_eos(tiny):
    reference = AutoTokenizer.from_pretrained(tiny.tokenizer)
    found, encoding = documents(tiny.tokenizer)
    assert found == [[*reference(text).input_ids, 2] for text in TEXTS]
    assert found[0][0] == 1
    # As in corpora of before: nothing that is there has to be prepared again.
    assert encoding.as_json() == {**encoding.as_json(), "bos": True, "eos": True} and encoding.separator is None
