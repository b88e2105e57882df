"""Tiny checkpoints on disk, built once and copied."""

import json
import os
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

WORDS = (
    "the",
    "of",
    "a",
    "and",
    "tide",
    "moon",
    "sea",
    "water",
    "bread",
    "dough",
    "lock",
    "pin",
    "key",
    "map",
    "bee",
    "hive",
)


def bert_config(**options):
    from transformers import BertConfig

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return BertConfig(**({"vocab_size": 40, "max_position_embeddings": 64} | sizes | options))


def save_bert(directory: Path, **options) -> Path:
    """A random BERT checkpoint in safetensors, without a tokenizer."""
    from transformers import BertModel

    from fullrank.spec.quiet import forked_rng, quiet

    with quiet(), forked_rng(1):
        BertModel(bert_config(**options)).save_pretrained(directory)
    return directory


def save_tokenizer(directory: Path, *, special: bool = True, words=WORDS) -> Path:
    """A tokenizer of whole words; unknown words are [UNK], sentences are framed by [CLS] and [SEP] where `special`."""
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: place for place, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    names = {"unk_token": "[UNK]"}
    if special:
        tokenizer.post_processor = TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
        names |= {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(directory)
    return directory


def as_pickle(directory: Path, state=None) -> Path:
    """Turn a checkpoint's safetensors into a pickle."""
    from safetensors.torch import load_file

    file = directory / "model.safetensors"
    torch.save(load_file(file) if state is None else state, directory / "pytorch_model.bin")
    file.unlink()
    return directory


def edit_config(directory: Path, **options) -> Path:
    """Change options in a checkpoint's config.json and nothing else."""
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | options))
    return directory


class Evil:
    """A pickle that writes a file when it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)
