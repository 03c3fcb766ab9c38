from __future__ import annotations

import json
import re
import timeit
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from upq import protocol, wire
from upq.errors import BadParams, BadText, RequestError, TooLong, UnknownCommand
from upq.protocol import SUBMIT, SUBMIT_MANY, VERB, Batch, Options, Request


def parse(line: str | bytes) -> Request:
    request = protocol.parse(line if isinstance(line, bytes) else line.encode())
    assert request is not None
    return request


# Submits as text


@pytest.mark.parametrize(
    ("line", "params"),
    [
        ("test", {}),
        ("test fid:50", {"fid": "50"}),
        ("test  a:1\tb:2 ", {"a": "1", "b": "2"}),
        ("\t test a:1", {"a": "1"}),
        ("test url:http://a:80/x", {"url": "http://a:80/x"}),
        ("test 50", {"50": ""}),
        ("test a:1 a:2", {"a": "2"}),
        ("test key:", {"key": ""}),
        ("test :value", {"": "value"}),
        ("test mail:a@b.org", {"mail": "a@b.org"}),
        ("test path:/tmp/ä b", {"path": "/tmp/ä", "b": ""}),
        ("test path:/tmp/a\u00a0b\u2003c", {"path": "/tmp/a\u00a0b\u2003c"}),
    ],
)
def test_words_split_at_blanks_and_at_their_first_colon(line: str, params: object) -> None:
    assert parse(line) == Request(SUBMIT, "test", params, line=line)


@pytest.mark.parametrize(
    ("words", "params"),
    [
        ('msg:"two words"', {"msg": "two words"}),
        ("msg:'two words'", {"msg": "two words"}),
        ('"msg:two words"', {"msg": "two words"}),
        ('"two words" x', {"two words": "", "x": ""}),
        (r'msg:"a \"b\" \\ \n\t\r \d"', {"msg": 'a "b" \\ \n\t\r \\d'}),
        (r"msg:'no \n escapes'", {"msg": r"no \n escapes"}),
        ("msg:\"it's\" that:'\"'", {"msg": "it's", "that": '"'}),
        ('it\'s size:5" a:b:"c', {"it's": "", "size": '5"', "a": 'b:"c'}),
        ('a:"" b:', {"a": "", "b": ""}),
        ('a:"x\ty"', {"a": "x\ty"}),
    ],
)
def test_quotes_are_read_where_a_word_or_value_starts_with_one(words: str, params: object) -> None:
    assert parse(f"test {words}").params == params


@pytest.mark.parametrize("words", ['a:"b', "a:'b", '"', 'a:"b"c', '"a":b', 'a:"b\\"'])
def test_a_quote_that_does_not_fit_is_bad_params(words: str) -> None:
    with pytest.raises(BadParams, match="quote"):
        parse(f"test {words}")


@pytest.mark.parametrize(
    "words",
    [
        '{"fid": 50, "list": [1, null]}',
        '@priority:high {"fid": 50, "list": [1, null]}',
        '{"fid": 50, "list": [1, null]} @priority:high',
        r'"{\"fid\": 50, \"list\": [1, null]}"',
    ],
)
def test_a_json_object_is_accepted_as_the_argument(words: str) -> None:
    request = parse(f"hash {words}")
    assert request.params == {"fid": 50, "list": [1, None]}
    assert request.options.priority == (10 if "high" in words else None)
    assert not request.json


def test_the_line_and_what_follows_its_first_word_are_kept() -> None:
    assert parse("test \t a:1  b\t").args == "a:1  b"
    assert parse("test").args == ""


@pytest.mark.parametrize("line", [b"", b"\r", b"  \t", b" \r"])
def test_an_empty_line_is_no_request(line: bytes) -> None:
    assert protocol.parse(line) is None


def test_a_carriage_return_at_the_end_is_no_part_of_the_line() -> None:
    assert parse(b"test a:1\r").params == {"a": "1"}


# Options


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("@in:10m", Options(in_s=600)),
        ("@at:2026-12-01T02:00:00Z", Options(run_at=1_796_090_400_000_000)),
        ("@priority:high", Options(priority=10)),
        ("@priority:low", Options(priority=-10)),
        ("@priority:-7", Options(priority=-7)),
        ("@key:abc", Options(key="abc")),
        ('@key:"two words"', Options(key="two words")),
        ('"@key:two words"', Options(key="two words")),
        ("@queue:a.b @node:n1", Options(queue="a.b", node="n1")),
        ("@timeout:30s @retries:3 @expires:1h", Options(timeout_s=30, retries=3, expires_s=3600)),
        ("@after:5,3,5", Options(after=(5, 3))),
    ],
)
def test_options_are_converted(words: str, options: Options) -> None:
    assert parse(f"test a:1 {words}") == Request(
        SUBMIT, "test", {"a": "1"}, options, line=f"test a:1 {words}"
    )


@pytest.mark.parametrize(
    "word",
    [
        *("@inn:10m", "@", "@:1", "@in", "@in:soon", "@in:-1s", "@at:noon", "@in:200000w"),
        *("@at:9999-12-31T23:59:59Z", "@at:9000-01-01T00:00:00Z"),
        *("@priority:urgent", "@priority:99999999", "@key:", "@retries:-1", "@retries:x"),
        *("@after:", "@after:1,,2", "@after:a", "@after:99999999999999999999", "@after:²"),
        *("@timeout:inf", "@in:1h @at:2026-12-01T02:00:00Z"),
    ],
)
def test_a_bad_option_is_bad_params_and_names_the_option(word: str) -> None:
    with pytest.raises(BadParams, match="@"):
        parse(f"test {word}")


def test_every_field_of_the_options_can_be_given() -> None:
    options = {"priority": 3, "key": "k", "queue": "q", "node": "n", "timeout": 1.5}
    options |= {"in": 1, "retries": 2, "expires": "1h", "after": [1, "2"]}
    options |= {"notify": ["syslog", "mail:a@x"], "notify_fail": "syslog", "notify_success": "x"}
    given = parse(json.dumps({"submit": "t", "options": options})).options
    assert given._replace(run_at=0).count(None) == 0
    assert given.timeout_s == 1.5
    assert given.after == (1, 2)
    assert given.notify == "syslog mail:a@x"


# JSON


def test_a_json_line_is_a_submit() -> None:
    line = '{"submit": "hash", "params": {"fid": 50}, "options": {"key": "k"}}'
    assert parse(line) == Request(
        SUBMIT, "hash", {"fid": 50}, Options(key="k"), json=True, line=line
    )
    assert parse('{"submit": "status"}').kind == SUBMIT


def test_submit_many_holds_submits() -> None:
    request = parse('{"submit_many": [{"submit": "a"}, {"submit": "b", "params": {"x": [1]}}]}')
    assert request.kind == SUBMIT_MANY
    assert [(each.verb, each.params) for each in request.many] == [("a", {}), ("b", {"x": [1]})]


def test_a_submit_of_many_may_be_a_line() -> None:
    request = parse('{"submit_many": ["a x:1 @priority:high", {"submit": "b"}]}')
    first, second = request.many
    assert (first.verb, first.params, first.options.priority) == ("a", {"x": "1"}, 10)
    assert (second.verb, request.batch) == ("b", None)


def test_submit_many_says_what_follows_a_batch() -> None:
    request = parse('{"submit_many": ["a"], "then": "b x:1", "when": "ended", "open": true}')
    assert request.kind == SUBMIT_MANY
    batch = request.batch
    assert batch is not None
    assert batch.then is not None
    assert (batch.then.verb, batch.then.params) == ("b", {"x": "1"})
    assert batch == Batch(batch.then, 0, "ended", "", True)
    later = parse('{"then": {"submit": "b"}}')
    assert (later.kind, later.many, later.batch and later.batch.open) == (SUBMIT_MANY, (), False)


def test_submit_many_adds_to_a_batch_and_closes_it() -> None:
    assert parse('{"submit_many": ["a"], "batch": 17}').batch == Batch(id=17, open=True)
    keyed = parse('{"submit_many": ["a"], "batch": 17, "key": "k", "close": true}').batch
    assert keyed == Batch(id=17, key="k")
    closing = parse('{"batch": 17, "close": true}')
    assert (closing.many, closing.batch) == ((), Batch(id=17))


@pytest.mark.parametrize(
    "line",
    [
        *("{}", "{", '{"a": 1} x', '{"submit": 5}', '{"submit": ""}', '{"submit": "a", "x": 1}'),
        '{"submit": "a", "submit": "b"}',
        '{"submit": "a", "params": {"x": 1, "x": 2}}',
        '{"submit": "a", "params": [1]}',
        '{"submit": "a", "options": [1]}',
        '{"submit": "a", "options": {"inn": 1}}',
        '{"submit": "a", "options": {"in": true}}',
        '{"submit": "a", "options": {"in": 1e300}}',
        '{"submit": "a", "options": {"in": 1' + "0" * 400 + "}}",
        '{"submit": "a", "options": {"priority": 1.5}}',
        '{"submit": "a", "options": {"priority": [1]}}',
        '{"submit": "a", "options": {"after": [true]}}',
        '{"submit": "a", "params": {"x": NaN}}',
        '{"submit": "a", "params": {"x": -Infinity}}',
        '{"submit": "a", "params": {"x": 1e999}}',
        '{"submit": "a", "params": {"x": ' + "1" * 5000 + "}}",
        '{"submit": "a", "params": {"x": ' + "[" * 40 + "]" * 40 + "}}",
        '{"submit": "a", "params": {"x": ' + "[" * 30000,
        *('{"submit_many": []}', '{"submit_many": {}}', '{"submit_many": [1]}'),
        '{"submit_many": [{"submit": "a"}], "submit": "b"}',
        '{"submit_many": [{"verb": "ping"}]}',
        *('{"submit_many": ["ping"]}', '{"submit_many": [""]}', '{"submit_many": ["{}"]}'),
        *('{"batch": 17}', '{"batch": "x", "close": true}', '{"batch": 17, "close": 1}'),
        *('{"then": "a", "batch": 17}', '{"then": ["a"]}', '{"then": "a", "when": "x"}'),
        '{"submit_many": ["a"], "open": true}',
        '{"submit_many": ["a"], "batch": 17, "when": "done"}',
        *('{"verb": "show"}', '{"verb": "show", "id": "x"}', '{"verb": "ping", "submit": "a"}'),
        'test {"a": 1',
        'test {"a": 1}x',
        'test {"a": 1, "a": 2}',
    ],
    ids=lambda line: line[:50],
)
def test_json_that_does_not_fit_is_bad_params(line: str) -> None:
    with pytest.raises(BadParams):
        parse(line)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"submit": "a", "parms": {}}', 'not "parms" (did you mean params?)'),
        ('{"sumbit": "a"}', 'a submit is {"submit": type,'),
        ('{"submit": "a", "params": [1]}', "params: a JSON object is needed, not [1]"),
        ('{"submit": "a", "options": "x"}', 'options: a JSON object is needed, not "x"'),
        (
            '{"submit": "a", "options": {"retires": 1}}',
            "no option @retires (did you mean retries?)",
        ),
        ('{"submit_many": ["a", {"submit": 5}]}', "job 2 of 2: submit: text is needed"),
        ('{"submit_many": ["a", "b @in:x"]}', "job 2 of 2: @in: 'x' is not a duration"),
        ('{"then": {"sbmit": "a"}}', "then: a submit is"),
        ('{"then": "a", "wen": "done"}', 'not "wen" (did you mean when?)'),
        ('{"verb": "stauts"}', 'no verb "stauts" (did you mean status?)'),
        ('{"verb": "wait", "id": 1, "timout": 1}', 'not "timout" (did you mean timeout?)'),
        ("jobs stat:failed", 'not "stat" (did you mean state?)'),
    ],
)
def test_a_fault_names_the_member_and_what_it_may_have_meant(line: str, told: str) -> None:
    with pytest.raises(RequestError, match=re.escape(told)):
        parse(line)


@pytest.mark.parametrize("verb", ['"nope"', "5", "null", "[]"])
def test_an_unknown_verb_in_json_is_an_unknown_command(verb: str) -> None:
    with pytest.raises(UnknownCommand):
        parse(f'{{"verb": {verb}}}')


def test_json_may_be_thirty_two_levels_deep() -> None:
    def nested(levels: int) -> str:
        return '{"a":' * levels + "1" + "}" * levels

    parse(f"test {nested(32)}")
    parse(f"test {{{', '.join(f'{chr(34)}{n}{chr(34)}: [{n}]' for n in range(40))}}}")
    with pytest.raises(BadParams, match="deeper"):
        parse(f"test {nested(33)}")


# Text that is refused


@pytest.mark.parametrize("line", [b"test \xff", b"test \xc3", b"\xed\xa0\x80", b"{\xff}"])
def test_what_is_not_utf_8_is_bad_text(line: bytes) -> None:
    with pytest.raises(BadText, match="UTF-8"):
        parse(line)


@pytest.mark.parametrize("char", ["\0", "\x1b", "\r", "\x0b", "\x7f", "\x85", "\x9b"])
def test_a_control_character_is_bad_text(char: str) -> None:
    for line in f"test a{char}b", f'test a:"x{char}y"', f'{{"submit": "t{char}"}}':
        with pytest.raises(BadText, match="control"):
            parse(line)


@pytest.mark.parametrize("escape", [r"\u0000", r"\u001b", r"\b", r"\u009b", r"\ud800"])
def test_json_escapes_smuggle_nothing_in(escape: str) -> None:
    for line in (
        f'{{"submit": "t", "params": {{"a": [{{"b": "x{escape}"}}]}}}}',
        f'{{"submit": "t", "params": {{"x{escape}": 1}}}}',
        f'test {{"a": "x{escape}"}}',
    ):
        with pytest.raises(BadText):
            parse(line)


def test_json_escapes_of_white_space_and_characters_are_fine() -> None:
    assert parse(r'test {"a": "\n\r\t\ud83d\ude00\\u0000"}').params == {"a": "\n\r\t😀\\u0000"}


def test_lines_have_their_limits() -> None:
    text, jsons = b"test a:", b'{"submit":"t","params":{"a":"'
    parse(text.ljust(wire.LINE_LIMIT_BYTES, b"x") + b"\r")
    parse(jsons.ljust(wire.JSON_LIMIT_BYTES - 3, b"x") + b'"}}')
    for line in text.ljust(wire.LINE_LIMIT_BYTES + 1, b"x"), jsons.ljust(2 << 20, b"x"):
        with pytest.raises(TooLong):
            parse(line)


# Verbs


@pytest.mark.parametrize(
    ("line", "arguments"),
    [
        ("status", {}),
        ("jobs", {}),
        ("jobs state:failed type:hash limit:20", {"state": "failed", "type": "hash", "limit": 20}),
        ("jobs failed", {"state": "failed"}),
        ("jobs type:hash failed", {"type": "hash", "state": "failed"}),
        ("show 17", {"id": 17}),
        ("show id:17", {"id": 17}),
        ("wait 17 timeout:30s", {"id": 17, "timeout": 30.0}),
        ("wait timeout:1m 17", {"id": 17, "timeout": 60.0}),
        ("pause storage.p1.high", {"queue": "storage.p1.high"}),
        ("pause 'a queue'", {"queue": "a queue"}),
        ("resume", {}),
        ('check test  msg:"two words" @in:1h', {"line": 'test  msg:"two words" @in:1h'}),
        ("check 'test fid:50'", {"line": "test fid:50"}),
        ("claim q n:5 ttl:60s", {"queue": "q", "n": 5, "ttl": 60.0}),
        ("fail 17 99 it: broke", {"id": 17, "token": 99, "message": "it: broke"}),
        ('finish 17 99 {"a": [1]}', {"id": 17, "token": 99, "result": {"a": [1]}}),
        ("finish 17 99", {"id": 17, "token": 99}),
        ("beat 17 99 3 of 10", {"id": 17, "token": 99, "progress": "3 of 10"}),
        ("release 17 9223372036854775807", {"id": 17, "token": (1 << 63) - 1}),
    ],
)
def test_a_verb_has_its_arguments_by_name_or_in_order(line: str, arguments: object) -> None:
    assert parse(line) == Request(VERB, line.split(maxsplit=1)[0], arguments, line=line)


@pytest.mark.parametrize(
    "line",
    [
        *("show", "show x", "show 17 18", "show id:17 18", "show -1", "show 9223372036854775808"),
        *("jobs stat:failed", "jobs state:faild", "jobs limit:x", "ping 1", "pause", "pause ''"),
        *(
            "wait 17 timeout:soon",
            "check",
            "fail 17 99",
            "finish 17 99 {",
            "show 'x",
            "show \u0661",
        ),
    ],
)
def test_a_verb_with_wrong_arguments_is_bad_params(line: str) -> None:
    with pytest.raises(BadParams):
        parse(line)


def test_a_verb_in_json_has_the_same_arguments() -> None:
    request = parse('{"verb": "wait", "id": 17, "timeout": 2.5}')
    assert (request.kind, request.verb, request.json) == (VERB, "wait", True)
    assert request.params == {"id": 17, "timeout": 2.5}
    assert parse('{"verb": "release", "id": "17", "token": "99"}').params["token"] == 99
    assert parse('{"verb": "finish", "id": 1, "token": 2, "result": "{"}').params["result"] == "{"


def test_every_argument_of_every_verb_can_be_converted() -> None:
    named = {argument.name for known in protocol._ARGUMENTS.values() for argument in known}
    assert named == protocol._CONVERTERS.keys()


def test_the_manual_has_every_verb_option_and_code() -> None:
    manual = (Path(__file__).parent.parent / "docs/protocol.md").read_text()
    for verb, known in protocol.VERBS.items():
        assert f"| `{f'{verb} {known.usage}'.strip()}` | {known.meaning} |" in manual
    for option in protocol._OPTIONS:
        assert f"`@{option}:" in manual
    for error in RequestError.__subclasses__():
        assert f"| `{error.code}` |" in manual


# Any input

text = st.text(st.characters(exclude_categories=["Cs", "Cc"], include_characters="\t\n\r"))
names = text.filter(lambda name: ":" not in name and not name.startswith(("@", "{")))
leaves = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(-1e9, 1e9) | text
values = st.recursive(
    leaves, lambda inner: st.lists(inner) | st.dictionaries(text, inner), max_leaves=8
)


@given(st.binary() | st.text().map(lambda text: text.encode(errors="replace")))
@example(b'test "')
def test_any_bytes_are_a_request_or_an_error_of_the_protocol(line: bytes) -> None:
    for start in b"", b"{", b"test ", b"test {", b'test "', b"jobs ", b"test @", b'{"submit":':
        try:
            request = protocol.parse(start + line)
        except RequestError:
            continue
        assert request is None or request.kind in (SUBMIT, SUBMIT_MANY, VERB)


@given(st.dictionaries(names, text))
def test_joined_words_are_read_as_the_same_words(params: dict[str, str]) -> None:
    line = wire.join(["test", *(f"{key}:{value}" for key, value in params.items())])
    assert "\n" not in line
    assert parse(line).params == params


@given(st.dictionaries(text, values))
def test_params_survive_json(params: dict[str, object]) -> None:
    line = wire.encode({"submit": "test", "params": params})
    assert line.count(b"\n") == 1
    assert parse(line[:-1]).params == params
    assert parse(b"test " + wire.encode(params)[:-1]).params == params


def test_the_usual_line_is_read_in_no_time() -> None:
    # 1 us where this was written; the margin is for slow machines under load.
    seconds = min(timeit.repeat(lambda: protocol.parse(b"test fid:50"), number=2000, repeat=7))
    assert seconds / 2000 < 15e-6
