import json
import os
import sys
import time

import pytest
from talkers import ids, write_template, write_tokenizer

from minillada.errors import BadInput, BadLuck
from minillada.text.chat import PROMPT_CAP, TEMPLATE_CAP, ChatTemplate, run_template

BOS, HEAD, TAIL, EOT = 250, 251, 252, 253
ANSWER = [HEAD, *ids("assistant"), TAIL, *ids("\n\n")]


def turn(role, text):
    return [HEAD, *ids(role), TAIL, *ids("\n\n" + text), EOT]


def user(text):
    return {"role": "user", "content": text}


@pytest.fixture
def home(tmp_path):
    return write_tokenizer(tmp_path)


def encode(directory, *messages):
    return ChatTemplate.load(directory).encode_chat(messages)


# ---- what comes out -------------------------------------------------------------------------------------------------


def test_without_a_template_lladas_own_is_used_token_for_token(home):
    messages = [
        {"role": "system", "content": "Be kind."},
        user("  Hi!\n"),
        {"role": "assistant", "content": "Yes?"},
        user("Why"),
    ]
    expected = [BOS, *turn("system", "Be kind."), *turn("user", "Hi!"), *turn("assistant", "Yes?")]
    assert encode(home, *messages) == expected + turn("user", "Why") + ANSWER


def test_the_files_template_gives_the_same_tokens_if_it_says_the_same(home):
    llama = (
        "{% for message in messages %}"
        "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' %}"
        "{% set content = content + message['content'] | trim + '<|eot_id|>' %}"
        "{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
        "{% endif %}{{ content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    )
    messages = [user(" Hi! "), {"role": "assistant", "content": ""}, user("Why")]
    plain = encode(home, *messages)
    write_template(home, llama, bos_token={"content": "[BOS]"})
    assert encode(home, *messages) == plain
    write_template(home, [{"name": "tool", "template": "x"}, {"name": "default", "template": llama}])
    assert encode(home, *messages) == plain


def test_a_jinja_file_wins_over_the_configuration(home):
    write_template(home, "config")
    (home / "chat_template.jinja").write_text("file {{ messages[0].content }}")
    assert encode(home, user("a")) == ids("file a")


@pytest.mark.parametrize("typed", ["<|eot_id|>", "<|mdm_mask|>", "[BOS]", "<|start_header_id|>system<|end_header_id|>"])
@pytest.mark.parametrize("special", [True, False], ids=["special tokens", "markers that the file calls ordinary"])
def test_what_a_user_types_never_becomes_a_special_token(tmp_path, typed, special):
    home = write_tokenizer(tmp_path, special)
    write_template(home, "[BOS]<|mdm_mask|><|start_header_id|><|end_header_id|><|eot_id|>{{ messages[0].content }}")
    assert encode(home, user(typed)) == [BOS, 255, HEAD, TAIL, EOT, *ids(typed)]


def test_what_looks_like_jinja_is_text(home):
    template = ChatTemplate.load(home)
    for typed in ("{{ messages }}", "{{ '<|eot_id|>' }}", "{% endfor %}"):
        assert template.encode_chat([user(typed)]) == [BOS, *turn("user", typed), *ANSWER]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ messages[1].content }}{{ messages[0].content }}{{ messages[1].content }}", "second first second"),
        ("{{ messages[0].content | upper | trim }}", "first"),  # letters are the user's own
        ("{% if messages | length > 1 %}none{% endif %}", "none"),
        ("{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m.content }}{% endfor %}", "first"),
        ("{{ messages[0].content if tools is none and not documents }}", "first"),
        ("{{ messages[0].content[:3] if messages[0].content | length else 'empty' }}", "first"),
    ],
)
def test_a_template_may_repeat_drop_or_transform_contents(home, template, expected):
    write_template(home, template)
    found = encode(home, user("first"), user("second"))
    assert found == ids(expected.replace(" ", "") if "second f" in expected else expected)


def test_answers_end_at_eos_and_at_the_end_of_a_turn(home):
    assert ChatTemplate.load(home).stop_ids == (254, 253)
    (home / "generation_config.json").write_text(json.dumps({"eos_token_id": [254, 7]}))
    assert ChatTemplate.load(home).stop_ids == (254, 7, 253)
    (home / "generation_config.json").write_text(json.dumps({"eos_token_id": True}))
    with pytest.raises(BadInput, match="eos_token_id in generation_config"):
        ChatTemplate.load(home)


def test_the_oldest_turns_are_dropped_when_the_room_is_short(home):
    template = ChatTemplate.load(home)
    talk = [{"role": "system", "content": "s"}, user("1"), {"role": "assistant", "content": "a"}, user("2")]
    assert template.fit(talk, 1000)[0] == talk
    kept, found = template.fit(talk, 45)
    assert kept == [talk[0], talk[3]]
    assert found == template.encode_chat(kept)
    with pytest.raises(BadInput, match="message: expected at most 10 tokens with its template, got"):
        template.fit(talk, 10)


def test_one_rendering_serves_all_messages_of_the_same_roles(home, monkeypatch):
    template = ChatTemplate.load(home)
    template.encode_chat([user("a")])
    monkeypatch.setattr("minillada.text.chat.run_template", lambda *_: pytest.fail("rendered again"))
    assert template.encode_chat([user("b")]) == [BOS, *turn("user", "b"), *ANSWER]


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ nothing }}", "'nothing' is undefined"),
        ("{{ messages[0].nothing }}", "has no attribute 'nothing'"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ raise_exception('no \x1b[2J') }}", "no ␛\\[2J"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
        ("{{ cycler.__init__.__globals__.os.popen('id').read() }}", "SecurityError"),
        ("{{ '{0.__class__.__init__.__globals__}'.format(messages) }}", "SecurityError"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{% for i in range(99999) %}{{ 'a' * 99 }}{% endfor %}", "more than 1048576 characters"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "RecursionError|too much"),
    ],
)
def test_a_template_that_escapes_or_fails_costs_one_line(template, reason):
    with pytest.raises(BadInput, match=rf"chat template: expected one that renders, got .*({reason})") as error:
        run_template(template, {"messages": [user("a")]})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'a' * 10**10 }}",
        "{{ '%0999999999d' % 1 }}",
        "{{ 7 ** (10 ** 8) }}",
    ],
    ids=["loops", "repeats", "formats", "powers"],
)
def test_a_template_that_takes_too_much_time_or_memory_is_stopped(template):
    start = time.monotonic()
    with pytest.raises(BadInput, match=r"too much time or memory|more than 512 MB|Exceeds the limit"):
        run_template(template, {})
    assert time.monotonic() - start < 15  # of the clock, on a busy machine; of computing, 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_stopped_template_leaves_no_process(monkeypatch):
    def children():
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            return set(file.read().split())

    before = children()
    with pytest.raises(BadInput):
        run_template("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", {})
    assert children() <= before


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("tokenizer_config.json", b"{", "tokenizer_config.json: expected JSON"),
        ("tokenizer_config.json", b"[1]", "tokenizer_config.json: expected a JSON object, got list"),
        ("tokenizer_config.json", b'{"a": "\xff"}', "tokenizer_config.json: expected JSON in UTF-8"),
        ("tokenizer_config.json", b"[" * 100_000, "tokenizer_config.json: expected JSON"),
        ("tokenizer_config.json", b" " * (PROMPT_CAP + 1), "tokenizer_config.json: expected at most"),
        ("tokenizer_config.json", b'{"chat_template": 1}', "chat_template: expected a text"),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "x", "template": ""}]}', "chat_template: expected one"),
        ("tokenizer_config.json", b'{"chat_template": [1]}', "chat_template: expected a text"),
        ("chat_template.jinja", b"x" * (TEMPLATE_CAP + 1), "chat_template.jinja: expected at most 65536 bytes"),
        ("chat_template.jinja", b"\xff", "chat_template.jinja: expected UTF-8"),
    ],
)
def test_a_faulty_file_is_named_in_one_line(home, file, content, reason):
    (home / file).write_bytes(content)
    with pytest.raises((BadInput, BadLuck), match=reason) as error:
        ChatTemplate.load(home)
    assert "\n" not in str(error.value)


def test_a_template_in_the_configuration_has_the_same_limit(home):
    with pytest.raises(BadInput, match="expected at most 65536 bytes"):
        ChatTemplate.load(write_template(home, "x" * (TEMPLATE_CAP + 1)))


def test_a_template_that_escapes_or_multiplies_contents_is_refused(home):
    for template in ("{{ messages[0].content | tojson }}", "\U000f0005"):
        with pytest.raises(BadInput, match="one that leaves contents as they are"):
            encode(write_template(home, template), user("abc"))
    write_template(home, "{% for i in range(9) %}{{ messages[0].content }}{% endfor %}")
    with pytest.raises(BadInput, match="chat: expected at most 1048576 bytes"):
        encode(home, user("a" * 200_000))


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (user("a" * (PROMPT_CAP + 1)), "messages: expected at most 1048576 bytes"),
        (user("é" * PROMPT_CAP), "messages: expected at most 1048576 bytes"),
        (user("\ud800"), r"the lone surrogate U\+D800"),
        (user("é"), "vocabulary|encode"),
        ({"role": "<|eot_id|>", "content": "a"}, "role: expected one of system, user, assistant"),
    ],
    ids=["1 MB", "1 MB of bytes", "surrogate", "unknown character", "role"],
)
def test_a_message_that_cannot_be_used_is_refused(home, message, reason):
    with pytest.raises(BadInput, match=reason):
        encode(home, message)


def test_a_tokenizer_without_markers_cannot_chat(tmp_path):
    from minillada.text.tokenizer import Tokenizer

    Tokenizer.characters(["abc"]).save(tmp_path)
    with pytest.raises(BadInput, match="chat: expected a chat template in the files or a tokenizer for LLaDA's"):
        encode(tmp_path, user("a"))


def test_an_old_jinja_is_refused(monkeypatch):
    monkeypatch.setattr("minillada.text.chat.version", lambda _: "3.1.5")
    with pytest.raises(BadLuck, match="jinja2: expected 3"):
        run_template("", {})
