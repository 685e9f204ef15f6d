"""generate --draft-model and serve --draft-model: who drafts, and what is refused."""

from __future__ import annotations

import argparse
import shutil

import pytest
from gguf_models import write_model

from llamatelemetry.cli import serve, speculation
from llamatelemetry.cli.main import main


@pytest.fixture
def models(tmp_path):
    """A target, and a twin of it."""
    path = tmp_path / "tiny.gguf"
    write_model(path, "llama")
    return path, shutil.copy(path, tmp_path / "twin.gguf")


def test_generate_has_a_model_draft(capsys, models):
    target, twin = map(str, models)
    asked = ["generate", "cat", "--model", target, "--max-tokens", "30", "--exact"]
    texts = []
    for more in ([], ["--draft-model", twin], ["--draft-model", twin, *COUNT]):
        assert main([*asked, *more]) == 0
        out, err = capsys.readouterr()
        texts.append(out)
        assert ("drafted tokens" in err) == bool(more)
        if more:
            words = err.partition("drafted tokens ")[2].split()
            right, drafted = int(words[0]), int(words[2])
            assert 0 < right == drafted  # of a twin
    assert len(set(texts)) == 1


COUNT = ["--num-speculative-tokens", "2"]


def serving(*arguments):
    parser = argparse.ArgumentParser()
    serve.add_command(parser.add_subparsers())
    return parser.parse_args(["serve", *map(str, arguments), "--device", "cpu"])


def test_serve_has_a_model_draft(models):
    pytest.importorskip("fastapi")
    target, twin = models
    batcher, _ = serve._made(serving(target, "--draft-model", twin, *COUNT))
    handle = batcher.submit([5, 9, 2], max_tokens=12)
    assert len(handle.result().token_ids) == 12
    assert 0 < handle.stats.accepted_tokens == handle.stats.drafted_tokens
    plain, _ = serve._made(serving(target))
    assert plain.submit([5, 9, 2], max_tokens=12).result().token_ids == handle.token_ids


def test_serve_passes_on_how_requests_share(models):
    pytest.importorskip("fastapi")
    words = ["--max-batch-size", 3, "--prefill-chunk", 48, "--num-blocks", 9]
    batcher, _ = serve._made(serving(models[0], *words, "--num-host-blocks", 4))
    batcher.submit([5, 9, 2], max_tokens=2).result()
    scheduler = batcher._batch.scheduler
    found = scheduler.max_running, scheduler.prefill_chunk, scheduler.blocks.num_blocks
    assert found == (3, 48, 9)
    assert scheduler.host.num_blocks == 4


class Words:
    def __init__(self, *words):
        self.words = words

    def get_vocab(self):
        return {word: i for i, word in enumerate(self.words)}


def test_another_tokenizer_is_refused(models, monkeypatch):
    speculation._check_tokenizer(Words("a", "b"), Words("a", "b", "[PAD2]"))
    with pytest.raises(
        ValueError, match=r"--draft-model must .* whose token 1 is 'b', got one whose is 'c'"
    ):
        speculation._check_tokenizer(Words("a", "c"), Words("a", "b"))
    args = serving(models[0], "--draft-model", models[1])
    with pytest.raises(ValueError, match="--draft-model must have the tokenizer"):
        speculation.speculation_of(args, Words("no such token"), "cpu")


def test_refusals(capsys, models, tmp_path):
    target, twin = models
    for arguments, sentence in (
        (
            ["--draft-model", twin, "--num-speculative-tokens", 0],
            "must lie in [1, 15] with --draft",
        ),
        (["--draft-model", tmp_path / "none.gguf"], "none.gguf"),
    ):
        words = ["generate", "cat", "--model", target, *arguments]
        assert main([*map(str, words)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert sentence in err
        assert err.count("\n") == 1
