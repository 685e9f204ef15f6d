"""Texts that match a JSON schema, a regular expression, a choice or a grammar, by xgrammar."""

from __future__ import annotations

import json
import re
import threading
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Characters of a grammar: the time that xgrammar takes grows with the square of its choices.
MAX_TEXT = 1 << 16


@dataclass(frozen=True)
class CompiledGrammar:
    """A grammar over one tokenizer's tokens; any number of texts may follow it.

    Attributes:
        compiled: xgrammar's.
        ends_itself: whether a text ends where nothing may follow, for want of a token that ends it.
    """

    compiled: Any
    ends_itself: bool

    def matcher(self) -> GrammarMatcher:
        """A text's place in it, at its beginning."""
        return GrammarMatcher(self.compiled, self.ends_itself)


class GrammarMatcher:
    """Where one text stands in a grammar."""

    def __init__(self, compiled: Any, ends_itself: bool) -> None:
        import xgrammar

        self._matcher = xgrammar.GrammarMatcher(compiled, terminate_without_stop_token=ends_itself)
        self._ends_itself = ends_itself
        size = compiled.tokenizer_info.vocab_size
        self._words = torch.full((1, -(-size // 32)), -1, dtype=torch.int32)

    @property
    def is_complete(self) -> bool:
        """Whether nothing may follow."""
        if not self._matcher.is_terminated():
            return False
        if not self._ends_itself:  # the token that ends the text was the last
            return True
        # Without such a token xgrammar means that the text may end here.
        self._words.fill_(-1)
        self._matcher.fill_next_token_bitmask(self._words, 0)
        return not self._words.any()

    def fill(self, words: Tensor, row: int) -> None:
        """Sets a row of a token bitmask [rows, num_words] int32 on the CPU to what may come next;
        tokens that the tokenizer does not have may not."""
        self._words.fill_(-1)
        self._matcher.fill_next_token_bitmask(self._words, 0)
        count = min(self._words.shape[1], words.shape[1])
        words[row] = 0
        words[row, :count] = self._words[0, :count]

    def accept(self, token: int) -> None:
        """Goes on by a token.

        Raises:
            RuntimeError: the grammar does not allow it.
        """
        if not self._matcher.accept_token(token):
            raise RuntimeError(f"the grammar must allow the token that was drawn, got {token}")


class Structures:
    """Makes grammars for LogitOptions over one engine's tokenizer. Threads may share it.

    Args:
        engine: InferenceEngine.

    Raises:
        ImportError: xgrammar is not installed.

    Example:
        >>> engine = InferenceEngine(loaded)
        >>> options = LogitOptions(grammar=Structures(engine).choice(["yes", "no"]))
        >>> handle = ContinuousBatching(2, engine).submit("Is it wet?", logits=options)
        >>> handle.result().text in ("yes", "no")
        True
    """

    def __init__(self, engine: Any) -> None:
        import xgrammar

        model = engine.loaded.model
        self._eos: Collection[int] = engine.loaded.eos_ids
        with warnings.catch_warnings():  # of a tokenizer without a token that ends the text
            warnings.simplefilter("ignore", UserWarning)
            info = xgrammar.TokenizerInfo.from_huggingface(
                engine.tokenizer,
                vocab_size=model.get_input_embeddings().num_embeddings,
                stop_token_ids=list(self._eos) or None,
            )
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=2)
        self._lock = threading.Lock()

    def json(self) -> CompiledGrammar:
        """Any JSON object."""
        return self._made("json_schema", self._compiler.compile_json_schema, '{"type": "object"}')

    def json_schema(self, schema: Any) -> CompiledGrammar:
        """JSON of a schema.

        Args:
            schema: as a mapping, or as text.

        Raises:
            ValueError: what of it is not served.
        """
        text = schema if isinstance(schema, str) else json.dumps(schema)
        return self._made("json_schema", self._compiler.compile_json_schema, text)

    def regex(self, pattern: str) -> CompiledGrammar:
        """A text that a regular expression matches as a whole.

        Raises:
            ValueError: it is none, or has what is not served (look-around, back-references).
        """
        return self._made("regex", self._compiler.compile_regex, pattern)

    def choice(self, texts: Sequence[str]) -> CompiledGrammar:
        """One of these texts.

        Raises:
            ValueError: there is none, or one is empty or no text.
        """
        if isinstance(texts, str) or not all(isinstance(text, str) and text for text in texts):
            raise ValueError(f"choice must be texts that are not empty, got {texts!r:.80}")
        if not texts:
            raise ValueError("choice must hold at least one text, got none")
        # What dumps writes is a string of the grammar too.
        words = " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)
        return self._made("choice", self._compiler.compile_grammar, f"root ::= {words}")

    def grammar(self, text: str) -> CompiledGrammar:
        """A text of a grammar in GGML's BNF, from its rule "root" on.

        Raises:
            ValueError: where it is none.
        """
        return self._made("grammar", self._compiler.compile_grammar, text)

    def _made(self, name: str, compile_: Callable[[str], Any], text: str) -> CompiledGrammar:
        if not isinstance(text, str):
            raise ValueError(f"{name} must be text, got {text!r:.80}")
        if len(text) > MAX_TEXT:
            raise ValueError(f"{name} must have at most {MAX_TEXT} characters, got {len(text)}")
        try:
            with self._lock:
                compiled = compile_(text)
        except (RuntimeError, ValueError, TypeError) as error:
            # Without the time and the place in xgrammar's sources.
            reason = re.sub(r"^\[[\d:]+\] \S+: ", "", " ".join(str(error).split()))
            raise ValueError(f"{name}: {reason:.300}") from error
        return CompiledGrammar(compiled, not self._eos)
