"""Text and token ids, in one encoding everywhere.

A tokenizer that comes as a sentencepiece model is run by sentencepiece itself, in training, generation, evaluation and
export; one that exists only as Hugging Face files by `tokenizers`.
"""

from dist_train.tokenizer.answers import MaskedChat, encode_answers, has_answers
from dist_train.tokenizer.base import EncodedChat, Tokenizer
from dist_train.tokenizer.chat import Message, RefusedChatError, Templates
from dist_train.tokenizer.check import PROBES, conversion_note, differences, piece_difference
from dist_train.tokenizer.huggingface import HuggingFaceTokenizer
from dist_train.tokenizer.load import load_tokenizer, refuse_torn
from dist_train.tokenizer.sentencepiece import SentencePieceTokenizer
from dist_train.tokenizer.train import train_tokenizer

__all__ = [
    "PROBES",
    "EncodedChat",
    "HuggingFaceTokenizer",
    "MaskedChat",
    "Message",
    "RefusedChatError",
    "SentencePieceTokenizer",
    "Templates",
    "Tokenizer",
    "conversion_note",
    "differences",
    "encode_answers",
    "has_answers",
    "load_tokenizer",
    "piece_difference",
    "refuse_torn",
    "train_tokenizer",
]
