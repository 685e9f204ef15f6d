"""A server of a tiny random model whose tokens are characters, in a thread of its own."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

import pytest
import torch

pytest.importorskip("fastapi")
import uvicorn
from families import tiny_model
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from tokenizers.decoders import Fuse
from transformers import PreTrainedTokenizerFast

from llamatelemetry.inference.continuous import ContinuousBatching
from llamatelemetry.inference.engine import InferenceEngine
from llamatelemetry.loading.find import LoadedModel
from llamatelemetry.serving.app import ServerConfig, create_app

TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }};{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


def tiny_engine(generation=None) -> InferenceEngine:
    with torch.inference_mode(False):
        torch.manual_seed(0)
        model = tiny_model("llama")
    size = model.config.vocab_size
    characters = [chr(32 + i) for i in range(95)] + [chr(0x100 + i) for i in range(size)]
    vocabulary = {character: i for i, character in enumerate(characters[:size])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE)
    return InferenceEngine(LoadedModel(model, fast, "tiny", (), generation or {}))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def served(engine=None, step_s=0.0, otel=None, speculation=None, num_blocks=None, **config):
    """The address of a running server whose steps take at least step_s, and the uvicorn server."""
    batcher = ContinuousBatching(
        4, engine or tiny_engine(), speculation=speculation, num_blocks=num_blocks
    )
    step = batcher.step
    batcher.step = lambda: (time.sleep(step_s), step())[1]
    app = create_app(batcher, ServerConfig("tiny", **config), otel)
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        assert time.monotonic() < deadline, "the server did not start in 30 s"
        time.sleep(0.02)
    try:
        yield f"http://127.0.0.1:{port}", server
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive(), "the server did not stop in 30 s"
