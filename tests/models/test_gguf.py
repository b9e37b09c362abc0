"""A GGUF file becomes the folder of the same model: written here by llama.cpp's own package, read through ours."""

from __future__ import annotations

import gguf
import pytest
import torch
from gguf.quants import dequantize, quantize

from dist_train.errors import UserError
from dist_train.models.gguf import unpacked_gguf
from dist_train.tokenizer import load_tokenizer

HEADS, QUANT = 2, gguf.GGMLQuantizationType.Q8_0
TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
TENSORS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_names(name):
    """llama.cpp's name of a weight of transformers' Llama."""
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    module, _, kind = name.rpartition(".")
    if module in outer:
        return f"{outer[module]}.{kind}"
    _, _, layer, part = module.split(".", 3)
    return f"blk.{layer}.{TENSORS[part]}.{kind}"


def rotated(weight):
    """Queries and keys in llama.cpp's order: it rotates neighbouring pairs, transformers halves of a head."""
    return weight.reshape(HEADS, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture(scope="module")
def written(tiny, tmp_path_factory):
    """A random Llama in a GGUF file whose matrices are Q8_0, and its weights as that file has them."""
    import sentencepiece
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=tiny.vocab_size,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        max_position_embeddings=128,
        rope_theta=50_000.0,
        tie_word_embeddings=False,
    )
    file = tmp_path_factory.mktemp("gguf") / "model.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_freq_base(50_000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(tiny.vocab_size)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tiny.tokenizer / "tokenizer.model"))
    ids = range(tiny.vocab_size)
    kinds = [2 if pieces.is_unknown(i) else 3 if pieces.is_control(i) else 6 if pieces.is_byte(i) else 1 for i in ids]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([pieces.id_to_piece(i) for i in ids])
    writer.add_token_scores([pieces.get_score(i) for i in ids])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(7)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    writer.add_float32("general.sampling.temp", 0.5)
    writer.add_int32("general.sampling.top_k", 40)
    weights = {}
    for name, weight in LlamaForCausalLM(config).state_dict().items():
        stored = weight.numpy()
        if weight.dim() == 1:
            writer.add_tensor(gguf_names(name), stored)
            weights[name] = weight
            continue
        moved = rotated(stored) if "q_proj" in name or "k_proj" in name else stored
        writer.add_tensor(gguf_names(name), quantize(moved, QUANT), raw_dtype=QUANT)
        # A row is quantised by itself: in which order the rows are stored changes none.
        weights[name] = torch.from_numpy(dequantize(quantize(stored, QUANT), QUANT).reshape(stored.shape).copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file, weights


@pytest.fixture(scope="module")
def folder(written, tmp_path_factory):
    return unpacked_gguf(written[0], tmp_path_factory.mktemp("cache"))


def test_the_folder_has_the_weights_that_the_file_multiplies_with(written, folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = model.state_dict()
    assert found.keys() == written[1].keys()
    assert all(torch.equal(found[name], weight) for name, weight in written[1].items())
    assert not model.config.tie_word_embeddings and not hasattr(model.config, "quantization_config")
    assert model.config.rope_parameters["rope_theta"] == 50_000.0 and model.config.max_position_embeddings == 128


def test_tokenizer_template_ends_and_sampling_come_along(tiny, folder):
    from transformers import GenerationConfig

    given, own = load_tokenizer(tiny.tokenizer), load_tokenizer(folder)
    texts = ["the model reads a token", " two  spaces ", "naïve 中文 😀", "a\nb\tc", "", "</s> is no end"]
    assert own.encode_batch(texts) == given.encode_batch(texts)
    assert (own.bos_id, own.eos_id, own.adds_bos, own.vocab_size) == (1, 2, True, tiny.vocab_size)
    assert own.chat_template == TEMPLATE
    settings = GenerationConfig.from_pretrained(folder)
    assert settings.eos_token_id == [2, 7] and (settings.temperature, settings.top_k) == (0.5, 40)


def test_it_is_made_once_and_again_for_another_content(written, folder, tmp_path):
    renamed = tmp_path / "other-name.gguf"
    renamed.write_bytes(written[0].read_bytes())
    stamp = (folder / "config.json").stat().st_mtime_ns
    assert unpacked_gguf(renamed, folder.parent) == folder
    assert (folder / "config.json").stat().st_mtime_ns == stamp
    renamed.write_bytes(renamed.read_bytes()[:-1] + b"\x01")
    assert unpacked_gguf(renamed, folder.parent) != folder


@pytest.mark.parametrize("kept", [4, 1000, 60_000])
def test_a_torn_file_is_told_and_leaves_nothing(written, tmp_path, kept):
    torn = tmp_path / "torn.gguf"
    torn.write_bytes(written[0].read_bytes()[:kept])
    with pytest.raises(UserError, match=r"torn\.gguf: no model can be read from it: .*; is it whole\? fetch it again"):
        unpacked_gguf(torn, tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_a_stage_takes_one_as_target(tiny, written, folder, command, monkeypatch, tmp_path):
    monkeypatch.setenv("DIST_TRAIN_GGUF_CACHE", str(folder.parent))
    prompts = f"tasks=[{{name: chat, inputs: {tiny.chat_lines}, limit: 4}}]"
    how = ["gammas=[2]", "temperatures=[0]", "max_new_tokens=8", "target.precision=fp32", "token_rate.prompts=0"]
    words = [f"drafters={{itself: {folder}}}", prompts, *how, f"out={tmp_path / 'out'}"]
    code, said, complaint = command("evaluate", f"target.path={written[0]}", *words)
    assert code == 0, complaint
    assert " 3.00 " in said  # a model that drafts for itself has every draft accepted
    code, _, complaint = command("evaluate", "target.path=absent.gguf", *words)
    assert code == 2 and complaint.endswith("absent.gguf: no such file\n") and complaint.count("\n") == 1
