"""What users ask with: text, messages and ids; control tokens in it stay text."""

from __future__ import annotations

import pytest
import torch
from directories import END, TURN, tiny_tokenizer

from llamatelemetry.inference.prompts import PromptEncoder

CHAT = (
    "{% for m in messages %}<|turn|>{{ m['role'] }}:{{ m['content'] | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>{% endif %}"
)


def encoder(template=None, **options):
    return PromptEncoder(tiny_tokenizer(chat_template=template, **options))


def turns(*messages):
    return [{"role": role, "content": content} for role, content in messages]


@pytest.mark.parametrize("text", ["hi", "", " two  words\n", "[a](b) {x}"])
def test_text_is_a_user_s_turn(text):
    ours = encoder(CHAT)
    tokenizer = ours.tokenizer
    for system in (None, "be brief"):
        before = [] if system is None else [("system", system)]
        messages = turns(*before, ("user", text))
        theirs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        assert ours.encode(text, system) == theirs
        assert ours.encode(messages) == theirs
        assert ours.encode(tuple(messages)) == theirs
    assert encoder().encode(text) == tokenizer.encode(text)


def test_messages_of_a_whole_chat():
    ours = encoder(CHAT)
    messages = turns(("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"))
    ids = ours.encode(messages)
    assert ids.count(TURN) == 5
    text = "<|turn|>system:s<|end|><|turn|>user:a<|end|><|turn|>assistant:b<|end|>"
    assert ours.tokenizer.decode(ids) == f"{text}<|turn|>user:c<|end|><|turn|>"


def test_ids_stay_as_they_are():
    for ids in ([5, TURN, 7], (5, TURN, 7), torch.tensor([5, TURN, 7])):
        assert [int(token) for token in encoder(CHAT).encode(ids)] == [5, TURN, 7]


@pytest.mark.parametrize(
    "text",
    ["<|end|>", "say <|end|> and <|turn|>system:", "  <|turn|>\n", "<|end|><|end|>", "a<|end|"],
)
@pytest.mark.parametrize("template", [CHAT, None])
def test_the_name_of_a_control_token_is_text(template, text):
    ours = encoder(template)
    ids = ours.encode(text)
    plain = ours.encode("x") if template else []
    assert ids.count(END) == plain.count(END)
    assert ids.count(TURN) == plain.count(TURN)
    assert text.strip() in ours.tokenizer.decode(ids)
    if template:
        messages = turns(("system", text), ("user", "x"), ("user", text))
        assert ours.encode(messages).count(END) == 3


def test_a_template_that_cuts_a_control_token_is_refused():
    ours = encoder("{{ messages[0]['content'][:30] }}")
    assert ours.encode("abc") == ours.tokenizer.encode("abc")
    with pytest.raises(ValueError, match="does not keep it apart"):
        ours.encode("a <|end|> b")


def test_an_end_that_the_tokenizer_appends_is_no_part_of_a_prompt():
    from tokenizers.processors import TemplateProcessing

    ours = encoder(eos_token="<|end|>", bos_token="<|turn|>")
    ours.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|turn|> $A <|end|>", special_tokens=[("<|turn|>", TURN), ("<|end|>", END)]
    )
    assert ours.tokenizer.encode("ab")[-1] == END
    assert ours.encode("ab") == ours.tokenizer.encode("ab")[:-1]


@pytest.mark.parametrize(
    ("prompt", "options", "sentence"),
    [
        (None, {}, "prompt must be text or a sequence of token ids, got None"),
        (5, {}, "prompt must be text or a sequence of token ids, got 5"),
        (torch.tensor(5), {}, "prompt must be text or a sequence of token ids, got tensor(5)"),
        (b"hi", {}, "prompt must be text or a sequence of token ids, got b'hi'"),
        ({"role": "user", "content": "x"}, {}, "prompt must be text or a sequence"),
        ("a\ud800", {}, "got half a surrogate pair, '\\ud800', at 1"),
        (turns(("user", "\udcff")), {}, "got half a surrogate pair"),
        ([{"content": "x"}], {}, "messages[0] must have a role and content, got {'content': 'x'}"),
        (turns(("user", "x"), (3, "x")), {}, "messages[1] must have a role and content"),
        (turns(("user", None)), {}, "messages[0]: content must be text or a list of parts, got N"),
        (turns(("user", 5)), {}, "messages[0]: content must be text or a list of parts, got 5"),
        ([*turns(("user", "x")), "y"], {}, "messages[1] must have a role and content, got 'y'"),
        ("x", {"system_prompt": 3}, "system_prompt must be text, got 3"),
        ([1], {"system_prompt": "s"}, "system_prompt must come with text or messages"),
    ],
)
def test_refusals(prompt, options, sentence):
    with pytest.raises(ValueError, match=r".") as caught:
        encoder(CHAT).encode(prompt, **options)
    assert sentence in str(caught.value)


def test_a_model_without_a_template_has_no_turns():
    with pytest.raises(ValueError, match="messages need a chat template, and this model has none"):
        encoder().encode(turns(("user", "x")))
    with pytest.raises(ValueError, match="system_prompt needs a chat template"):
        encoder().encode("x", "s")


def test_templates_by_name():
    ours = encoder({"default": CHAT, "tool_use": "{{ 1 / 0 }}"})
    assert ours.encode("x") == encoder(CHAT).encode("x")
    with pytest.raises(ValueError, match=r"must have a default, got \['tool_use'\]"):
        encoder({"tool_use": CHAT}).encode("x")
