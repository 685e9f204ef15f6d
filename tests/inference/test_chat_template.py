"""Chat templates: transformers' text for those of models, one sentence for those that are none."""

from __future__ import annotations

import sys
import time

import pytest
from directories import tiny_tokenizer

from llamatelemetry.inference import chat_template
from llamatelemetry.inference.chat_template import TemplateRefusal, render

MESSAGES = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hi <b>&amp; {{ x }}\n"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": [{"type": "text", "text": "and?"}]},
]
TEMPLATES = {
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content']|string +"
    " '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}",
    "spaces": "  {% for m in messages %}\n    {% if loop.first %}\n{{ bos_token }}{% endif %}\n"
    "    {{- m.role ~ ': ' ~ m.content|trim -}}\n{% endfor %}\n",
    "json": "{{ messages | tojson }}{{ messages|tojson(indent=2) }}{{ tools is none }}",
    "controls": "{% for m in messages %}{% if loop.index0 == 1 %}{% continue %}{% endif %}"
    "{{ m.role }}{% if loop.index0 == 2 %}{% break %}{% endif %}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% endfor %}{{ eos_token }}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% endfor %}{{ ns.n * 2 }}{{ 7 % 4 }}{{ 2 ** 5 }}{{ 'ab' * 2 }}{{ [1] + [2] }}"
    "{{ '%s!' % 'x' }}",
    "macro": "{% macro turn(m) %}{{ m.role|upper }}{% if m.content is string %}"
    "{{ m.content.split(' ')[0] }}{% else %}{{ m.content[0].text }}{% endif %}{% endmacro %}"
    "{% for m in messages %}{{ turn(m) }}{% endfor %}",
    "filters": "{{ messages|map(attribute='role')|join(', ') }}{{ 'x'|center(9) }}{{ 'aXa'.replace("
    "'a', 'bb') }}{{ ['b', 'a']|sort|first }}{{ messages|length }}{{ '{:>4}'.format(3) }}",
    "not there": "{{ no_such_thing }}{{ messages[0].get('x', 'none') }}",
}


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_the_text_is_transformers(name):
    tokenizer = tiny_tokenizer(bos_token="<|turn|>", eos_token="<|end|>")
    theirs = tokenizer.apply_chat_template(
        MESSAGES, chat_template=TEMPLATES[name], add_generation_prompt=True, tokenize=False
    )
    assert render(TEMPLATES[name], MESSAGES, tokenizer.special_tokens_map) == theirs


ENDLESS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "recursion": "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "calls": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(99) }}",
    "power": "{{ 10 ** (10 ** 8) }}",
    "product": "{{ 'a' * 10 ** 9 }}",
    "list": "{{ [0] * 10 ** 9 }}",
    "sum": "{% set ns = namespace(s='a') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}"
    "{% endfor %}{{ ns.s }}",
    "tilde": "{% set ns = namespace(s='a') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}"
    "{% endfor %}{{ ns.s }}",
    "replace": "{% set ns = namespace(s='aa') %}{% for i in range(9) %}"
    "{% set ns.s = ns.s.replace('a', ns.s) %}{% endfor %}",
    "replace filter": "{% set ns = namespace(s='aa') %}{% for i in range(9) %}"
    "{% set ns.s = ns.s|replace('a', ns.s) %}{% endfor %}",
    "method": "{{ 'x'.ljust(10 ** 9) }}",
    "filter": "{{ 'x'|center(10 ** 9) }}",
    "percent": "{{ '%999999999d' % 1 }}",
    "format": "{{ '{:>999999999}'.format(1) }}",
    "nested format": "{{ '{:>{}}'.format(1, 10 ** 9) }}",
    "indent": "{{ messages|tojson(indent=10 ** 9) }}",
    "join": "{{ range(99999)|join('x' * 10 ** 6) }}",
    "output": "{% for i in range(99999) %}{{ 'a' * 10 ** 5 }}{% endfor %}",
    "set": "{% set x %}{% for i in range(99999) %}{{ 'a' * 10 ** 5 }}{% endfor %}{% endset %}",
    "parentheses": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
}


@pytest.mark.parametrize("name", list(ENDLESS))
def test_what_has_no_end_is_refused(name, monkeypatch):
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 1.0)
    begin, tracing = time.monotonic(), sys.gettrace()
    with pytest.raises(TemplateRefusal, match=r"chat template (takes|makes|fails)") as caught:
        render(ENDLESS[name], MESSAGES, {})
    assert time.monotonic() - begin < 10
    assert "\n" not in str(caught.value)
    assert sys.gettrace() is tracing


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{{ raise_exception('no system turn') }}", "refuses it: no system turn"),
        ("{{ raise_exception('two\nlines') }}", "refuses it: two lines"),
        ("{{ messages[0].foo.bar }}", "refuses it: 'dict object' has no attribute 'foo'"),
        ("{{ 1 / 0 }}", "fails: ZeroDivisionError: division by zero"),
        ("{{ messages[0]['content'] + 1 }}", "fails: TypeError"),
        ("{% no_such_tag %}", "refuses it: Encountered unknown tag 'no_such_tag'"),
        ("{% if %}", "refuses it"),
        ("{{ messages[0].content.__class__.__mro__ }}", "refuses it: access to attribute"),
        ("{{ messages.append(1) }}", "refuses it"),
        ("{% include 'other' %}", "fails: TypeError"),
        (["a", "list"], "must be text, got ['a', 'list']"),
        (3, "must be text, got 3"),
    ],
)
def test_refusals(template, sentence):
    with pytest.raises(TemplateRefusal) as caught:
        render(template, MESSAGES, {})
    assert f"the model's chat template {sentence}" in str(caught.value)
    assert "\n" not in str(caught.value)
