"""Tiny transformers directories, whole and damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from families import VOCAB, tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

END, TURN = VOCAB - 2, VOCAB - 1  # ids of the tokens <|end|> and <|turn|>


def tiny_tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    """A token a byte, as far as the vocabulary of tiny models goes, and two control tokens."""
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet())[: END - 1], "Ġ"]
    vocabulary = {letter: i for i, letter in enumerate(letters)} | {"<|end|>": END}
    tokenizer = Tokenizer(models.BPE(vocabulary | {"<|turn|>": TURN}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)
    fast.add_special_tokens({"additional_special_tokens": ["<|end|>", "<|turn|>"]})
    return fast


def write_directory(path: Path, family: str = "llama", model: Any = None, **options: Any) -> Path:
    """Saves a model, tiny and random by default, with a tokenizer of these options."""
    (tiny_model(family) if model is None else model).save_pretrained(path)
    tiny_tokenizer(**options).save_pretrained(path)
    return path


def change(path: Path, **fields: Any) -> None:
    """Sets fields of a JSON file."""
    found = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(found | fields))
