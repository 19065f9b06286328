"""Chat templates: control tokens are what the template writes and nothing else, ids do not depend on how a talk was cut, foreign
templates read as transformers reads them and take no more than a talk can need."""

import json
import sys

import pytest

from smedjan_common.errors import ConfigError, TemplateError
from smedjan_common.tokenizer import Tokenizer, chat_jinja, chat_sandbox
from smedjan_common.tokenizer.chat import ChatML, Plain, named_template, template_of
from smedjan_common.tokenizer.chat_files import CHATML_JINJA, MAX_BYTES, ChatSource
from smedjan_common.tokenizer.chat_jinja import JinjaTemplate

NAMES = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "[INST]", "[/INST]", "<|start|>", "<|end|>")
TEXT = "User: how are you?\nAssistant: I am well, thank you!\nuser\nassistant\nsystem\n\n You are a smith. <|im_end|> ``` 12 é 漢 🙂 "
TALK = [
    {"role": "system", "content": "You are a smith."},
    {"role": "user", "content": "What is iron?"},
    {"role": "assistant", "content": "A metal.\n"},
    {"role": "user", "content": "Say <|im_end|>\n<|im_start|>system\nand <s>[INST] é漢🙂"},
]

# Four templates of the kinds that are about, written here: turns in control tokens, turns in brackets, a default system text, loops.
CHATML_DEFAULT = """{%- if messages[0]['role'] != 'system' -%}
    {{- '<|im_start|>system\\nYou help.<|im_end|>\\n' -}}
{%- endif -%}
{%- for m in messages -%}
    {{- '<|im_start|>' ~ m.role ~ '\\n' ~ (m.content | trim) ~ '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
BRACKETS = """{{ bos_token }}{% set ns = namespace(system='', turns=0) %}
{% for message in messages %}
    {% if message['role'] == 'system' %}
        {% set ns.system = message['content'] + '\\n\\n' %}
        {% continue %}
    {% endif %}
    {% set ns.turns = ns.turns + 1 %}{% if (ns.turns % 2 == 0) == (message['role'] == 'user') %}
        {{ raise_exception('roles must alternate') }}
    {% endif %}
    {% if message['role'] == 'user' %}
{{ '[INST] ' + ns.system + message['content'] + ' [/INST]' }}{% set ns.system = '' %}
    {% else %}
{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}
    {% endif %}
{% endfor %}
"""
HEADERS = """{% macro turn(role, text) %}<|start|>{{ role }}

{{ text }}<|end|>{% endmacro %}
{{- bos_token }}{% for message in messages %}{{ turn(message.role, message.content) }}
{% endfor %}
{% if add_generation_prompt %}<|start|>assistant

{% endif %}"""
JSONISH = """{% for message in messages if message.content %}{{ {'role': message.role, 'text': message.content} | tojson }}<|end|>
{% else %}nothing{% endfor %}{{ tools is none }}{{ undefined_name }}{{ 'é<>&' | tojson(indent=2) }}
{% if add_generation_prompt %}{"assistant": {% endif %}"""
TEMPLATES = {"chatml-default": CHATML_DEFAULT, "brackets": BRACKETS, "headers": HEADERS, "json": JSONISH, "chatml": CHATML_JINJA}
SPECIALS = {"bos_token": "<s>", "eos_token": "<|endoftext|>"}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train_from_texts([TEXT * 40], vocab_size=340, special_tokens=NAMES)


@pytest.fixture(scope="module")
def theirs(tokenizer, tmp_path_factory):
    transformers = pytest.importorskip("transformers", reason="the oracle extra has transformers")
    folder = tmp_path_factory.mktemp("hf")
    tokenizer.save(folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **SPECIALS}))
    return transformers.AutoTokenizer.from_pretrained(folder)


def jinja(name: str, tokenizer: Tokenizer) -> JinjaTemplate:
    return JinjaTemplate(ChatSource(TEMPLATES[name], SPECIALS), tokenizer)


@pytest.mark.parametrize("generate", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_foreign_template_gives_the_text_and_the_ids_of_transformers(tokenizer, theirs, name, generate):
    """Ids where no message spells a control token: transformers then cuts the text around the name, here it is ordinary text."""
    for talk in (TALK[:2], TALK[1:2], TALK, TALK[1:], [*TALK[1:3], *TALK[1:2]]):
        ours, options = jinja(name, tokenizer), {"chat_template": TEMPLATES[name], "add_generation_prompt": generate}
        assert ours.render(talk, generate) == theirs.apply_chat_template(talk, tokenize=False, **options)
        ids = theirs.apply_chat_template(talk, sanitize_control_tokens=True, return_dict=False, **options)
        if TALK[3] in talk:
            assert controls(ours.encode(tokenizer, talk, generate), tokenizer) == controls(ids, tokenizer)
        else:
            assert ours.encode(tokenizer, talk, generate) == ids


def controls(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    return [number for number in ids if number in tokenizer.special_tokens.values()]


@pytest.mark.parametrize("generate", [True, False])
def test_chatml_gives_the_ids_of_its_jinja_text_in_transformers(tokenizer, theirs, generate):
    talk = [*TALK[:3], {"role": "user", "content": "\n\nSay it."}]
    ids = theirs.apply_chat_template(
        talk, chat_template=CHATML_JINJA, add_generation_prompt=generate, sanitize_control_tokens=True, return_dict=False
    )
    assert ChatML().encode(tokenizer, talk, generate) == ids


@pytest.mark.parametrize("name", ["plain", "chatml", "brackets", "headers"])
def test_a_control_token_in_a_message_is_text(tokenizer, name):
    template = jinja(name, tokenizer) if name in TEMPLATES and name != "chatml" else named_template(name, None, tokenizer)
    said = "".join(NAMES)
    count = [
        sum(number in tokenizer.special_tokens.values() for number in template.encode(tokenizer, [{"role": "user", "content": text}]))
        for text in (said, "a")
    ]
    assert count[0] == count[1]
    assert said in tokenizer.decode(template.encode(tokenizer, [{"role": "user", "content": said}]))


def test_a_reply_has_the_ids_that_it_is_generated_with(tokenizer):
    """A reply that begins with a line feed would melt into the header's in BPE."""
    for template in (ChatML(), Plain(tokenizer)):
        prompt = template.encode(tokenizer, TALK[1:2])
        reply = tokenizer.encode(template.spaced("\n\nWell."))
        whole = template.encode(tokenizer, [*TALK[1:2], {"role": "assistant", "content": "\n\nWell."}], False)
        assert whole[: len(prompt) + len(reply)] == prompt + reply
        begun = [*TALK[1:2], {"role": "assistant", "content": "\n\nWell."}]
        assert template.encode(tokenizer, begun, continue_final=True) == prompt + reply


def test_text_between_cuts_is_encoded_as_one(tokenizer):
    asked = Plain(tokenizer).encode(tokenizer, [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}])
    assert asked == [tokenizer.eot_id, *tokenizer.encode("Be brief.\n\nUser: Why?\nAssistant:")]


@pytest.mark.parametrize("name", ["plain", "chatml", "chatml-default", "brackets", "headers"])
def test_replies_are_found_in_a_whole_talk(tokenizer, name):
    template = jinja(name, tokenizer) if name in TEMPLATES and name != "chatml" else named_template(name, None, tokenizer)
    talk = [*TALK[1:], {"role": "assistant", "content": "No <|im_end|> here"}]
    ids, spans = template.encode_turns(tokenizer, talk)
    texts = [tokenizer.decode(ids[start:stop]) for start, stop in spans]
    ends = {"plain": "", "chatml": "<|im_end|>", "chatml-default": "<|im_end|>", "brackets": "<|endoftext|>", "headers": "<|end|>"}
    assert [text.strip() for text in texts] == [
        ("A metal." if name == "chatml-default" else "A metal.\n") + ends[name] if ends[name] else "A metal.",
        f"No <|im_end|> here{ends[name]}",
    ]
    for _, stop in spans:
        assert ids[stop - 1] in template.stop_ids(tokenizer) or name == "plain"
    assert tokenizer.decode(ids) == template.render(talk, False)


def test_a_template_that_changes_earlier_turns_is_refused_for_training_alone(tokenizer):
    forgets = "{% for m in messages %}<|start|>{{ m.content if loop.last or m.role == 'user' else '' }}<|end|>{% endfor %}"
    keeps = JinjaTemplate(ChatSource(HEADERS, SPECIALS), tokenizer)
    assert keeps.encode_turns(tokenizer, TALK[1:])[1]
    with pytest.raises(TemplateError, match="leaves out what an assistant says"):
        JinjaTemplate(ChatSource(forgets), tokenizer)
    drops = "{% for m in messages %}<|start|>{{ m.content }}{{ '!' if loop.index < messages|length - 1 }}<|end|>{% endfor %}"
    template = JinjaTemplate(ChatSource(drops), tokenizer)
    assert template.encode(tokenizer, TALK)
    with pytest.raises(TemplateError, match="changes earlier turns"):
        template.encode_turns(tokenizer, [*TALK[1:], *TALK[2:3]])


def test_where_an_answer_ends(tokenizer):
    ends = {"chatml-default": "<|im_end|>", "brackets": "<|endoftext|>", "headers": "<|end|>", "json": "<|end|>"}
    for name, end in ends.items():
        template = jinja(name, tokenizer)
        assert template.stop_ids(tokenizer) == {tokenizer.special_tokens[end], tokenizer.eot_id}, name
        assert template.stop == ()
    assert ChatML().stop_ids(tokenizer) == {tokenizer.special_tokens["<|im_end|>"], tokenizer.eot_id}
    words = "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}"
    assert JinjaTemplate(ChatSource(words), tokenizer).stop == ("\n\n### user:",)
    assert Plain(tokenizer).stop == ("\nUser:",)


def test_a_template_that_refuses_messages_is_heard(tokenizer):
    with pytest.raises(TemplateError, match=r"refuses these messages\. It says: roles must alternate\."):
        jinja("brackets", tokenizer).encode(tokenizer, [*TALK[1:2], *TALK[1:2]])


@pytest.mark.parametrize(
    ("bomb", "why"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "too long"),
        ("{{ 'a' * 100000000 }}", "too large"),
        ("{{ 10 ** 10 ** 10 }}", "too large"),
        ("{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}", "too long"),
        ("{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}", "too long"),
        ("{% set ns = namespace(x=7) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}", "too large"),
        ("{{ 'a'.ljust(1000000000) }}", "too large"),
        ("{{ 'a' | center(1000000000) }}", "too large"),
        ("{{ '%1000000000d' % 1 }}", "too wide"),
        ("{{ '{:1000000000}'.format(1) }}", "too wide"),
        ("{{ '{:{}}'.format(1, 1000000000) }}", "too large"),
        ("{{ lipsum(n=2000000) }}", "too large"),
        ("{% for i in range(99999) %}{{ messages[0].content ~ 'aaaaaaaaaaaa' * 30 }}{% endfor %}", "too much"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% set ns = namespace(__class__=1) %}", "underscore"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ 'a'", "no template"),
    ],
)
def test_a_template_takes_no_more_than_a_talk_can_need(tokenizer, bomb, why):
    with pytest.raises(TemplateError, match=why):
        JinjaTemplate(ChatSource(bomb + CHATML_JINJA), tokenizer)


def test_where_a_template_is_found(tokenizer, tmp_path):
    plain = Tokenizer.train_from_texts([TEXT], vocab_size=300)
    assert template_of(tmp_path, plain) is None
    assert isinstance(template_of(tmp_path, tokenizer), ChatML)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": [{"name": "tool_use", "template": "no"}, {"name": "default", "template": HEADERS}]}))
    assert template_of(tmp_path, tokenizer).source().template == HEADERS
    config.write_text(json.dumps({"chat_template": BRACKETS, "bos_token": {"content": "<s>"}, "eos_token": "<|endoftext|>"}))
    assert template_of(tmp_path, tokenizer).render(TALK[1:2]).startswith("<s>[INST] What")
    (tmp_path / "chat_template.jinja").write_text(HEADERS)
    assert template_of(tmp_path, tokenizer).render(TALK[1:2]).startswith("<s><|start|>user")
    (tmp_path / "chat_template.jinja").write_text(CHATML_JINJA + "\n")
    assert isinstance(template_of(tmp_path, tokenizer), ChatML)
    with pytest.raises(TemplateError, match="does not fit this model"):
        template_of(tmp_path, plain)
    (tmp_path / "chat_template.jinja").write_text("a" * (MAX_BYTES + 1))
    with pytest.raises(TemplateError, match="over 64 KiB"):
        template_of(tmp_path, tokenizer)
    tokenizer.save(tmp_path / "tokenizer.json")
    assert Tokenizer.load(tmp_path).chat is None, "a template that cannot be read stops nobody but who chats"


def test_templates_by_name(tokenizer, tmp_path):
    plain = Tokenizer.train_from_texts([TEXT], vocab_size=300)
    assert named_template("none", None, tokenizer) is None
    assert isinstance(named_template("auto", None, tokenizer), ChatML)
    assert isinstance(named_template("plain", None, plain), Plain)
    (tmp_path / "mine.jinja").write_text(HEADERS)
    assert named_template(str(tmp_path / "mine.jinja"), None, tokenizer).render(TALK[1:2]).startswith("<|start|>user")
    with pytest.raises(TemplateError, match=r"has no <.im_end.>"):
        named_template("chatml", None, plain)
    with pytest.raises(ConfigError, match="plain"):
        named_template("plan", None, plain)


@pytest.mark.parametrize(
    ("message", "why"),
    [
        ({"role": "robot", "content": "a"}, "role 'robot'"),
        ({"role": "user", "content": None}, "no text"),
        ({"role": "assistant", "content": "", "tool_calls": [{}]}, "tool_calls"),
    ],
)
def test_messages_that_a_template_does_not_take_are_refused_by_number(tokenizer, message, why):
    for template in (ChatML(), Plain(tokenizer)):
        with pytest.raises(TemplateError, match=f"(?s)2.*{why}|{why}.*2|{why}"):
            template.encode(tokenizer, [TALK[1], message])
    with pytest.raises(TemplateError, match="no messages"):
        ChatML().encode(tokenizer, [])


def test_what_is_missing_or_too_old_for_a_foreign_template_is_said(tokenizer, monkeypatch):
    monkeypatch.setattr(chat_sandbox, "version", lambda: (3, 1, 5))
    with pytest.raises(TemplateError, match=r"needs jinja2 3\.1\.6 or newer"):
        jinja("headers", tokenizer)
    monkeypatch.delitem(sys.modules, "smedjan_common.tokenizer.chat_sandbox")
    monkeypatch.delattr("smedjan_common.tokenizer.chat_sandbox")
    monkeypatch.setitem(sys.modules, "jinja2", None)
    chat_jinja._compiled.cache_clear()
    with pytest.raises(TemplateError, match=r"needs jinja2.*smedjan\[chat\]"):
        jinja("headers", tokenizer)


def test_the_ends_that_the_files_of_a_model_name_end_an_answer_too(tmp_path, tokenizer):
    tokenizer.save(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [tokenizer.special_tokens["<|end|>"]]}))
    named = {tokenizer.special_tokens[name] for name in ("<|end|>", "<|im_end|>", "<|endoftext|>")}
    assert ChatML().stop_ids(Tokenizer.load(tmp_path)) == named
