"""Declared parameters, and the command lines that they fill."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from textwrap import indent
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upq.errors import BadParams
from upq.params import ParamSpec, argv, filled, folder, names_in, split_command, suggest


def check(declaration: str, **params: Any) -> dict[str, Any]:
    return ParamSpec.parse(declaration).check(params)


def fault(declaration: str, **params: Any) -> str:
    with pytest.raises(BadParams) as caught:
        check(declaration, **params)
    return str(caught.value)


def test_text_from_the_line_becomes_what_was_declared() -> None:
    got = check(
        "n:int x:float ok:bool file:path level:choice(a, b) more:json any:any text",
        n="-50",
        x="1.5",
        ok="Yes",
        file="/a b",
        level="b",
        more='{"a": [1]}',
        any="5",
        text="5",
    )
    assert got == {
        "n": -50,
        "x": 1.5,
        "ok": True,
        "file": "/a b",
        "level": "b",
        "more": {"a": [1]},
        "any": "5",
        "text": "5",
    }
    assert json.loads(json.dumps(got)) == got


def test_values_from_json_are_taken_as_they_are() -> None:
    values = {"n": 50, "x": 1.5, "ok": False, "more": [1], "any": None}
    assert check("n:int x:float ok:bool more:json any:any", **values) == values


def test_checking_twice_changes_nothing() -> None:
    spec = ParamSpec.parse("n:int ok:bool more:json level:choice(a,b)=a x:float=2")
    once = spec.check({"n": "1", "ok": "", "more": "[1]"})
    assert once == {"n": 1, "ok": True, "more": [1], "level": "a", "x": 2.0}
    assert spec.check(once) == once


def test_a_bare_name_is_a_yes() -> None:
    assert check("force:bool", force="") == {"force": True}


def test_optional_parameters_stay_away_and_defaults_come_in() -> None:
    declaration = 'a? b:int=3 c="two words" d:path?'
    assert check(declaration) == {"b": 3, "c": "two words"}
    assert check(declaration, a="", b="4") == {"a": "", "b": 4, "c": "two words"}


@pytest.mark.parametrize(
    ("declaration", "value", "text"),
    [
        ("fid:int", "abc", "fid: 'abc' is not a whole number"),
        ("fid:int", "", "fid: '' is not a whole number"),
        ("fid:int", "1_0", "fid: '1_0' is not a whole number"),
        ("fid:int", "1" * 19, f"fid: '{'1' * 19}' is not a whole number"),
        ("fid:int", True, "fid: True is not a whole number"),
        ("fid:int", 1.5, "fid: 1.5 is not a whole number"),
        ("fid:float", "nan", "fid: 'nan' is not a number"),
        ("fid:float", "1e999", "fid: '1e999' is not a number"),
        ("fid:float", True, "fid: True is not a number"),
        ("fid:float", [], "fid: [] is not a number"),
        ("fid:bool", "maybe", "fid: 'maybe' is not yes or no"),
        ("fid:path", "etc/passwd", "fid: 'etc/passwd' is not an absolute path"),
        ("fid:path", "/a\0b", r"fid: '/a\x00b' is not an absolute path"),
        ("fid:choice(a,b)", "c", "fid: 'c' is not one of a, b"),
        ("fid:json", "5", "fid: '5' is not a JSON object or list"),
        ("fid:json", "[" * 100_000, f"fid: '{'[' * 76}... is not a JSON object or list"),
        ("fid", 5, "fid: 5 is not text"),
    ],
)
def test_a_value_that_does_not_fit_is_named_with_its_parameter(
    declaration: str, value: Any, text: str
) -> None:
    assert fault(declaration, fid=value) == text


def test_every_fault_is_told_at_once() -> None:
    text = fault("fid:int path:path level", fdi="1", path="x")
    assert text == (
        "unknown parameter 'fdi' (did you mean fid?); fid: is missing;"
        " path: 'x' is not an absolute path; level: is missing"
    )


def test_thousands_of_unknown_parameters_make_a_short_answer() -> None:
    assert len(fault("a?", **{f"b{number}": "" for number in range(5000)})) < 200


def test_a_secret_value_is_not_repeated() -> None:
    with pytest.raises(BadParams, match=r"^pin: the value is not a whole number$"):
        ParamSpec.parse("pin:int").check({"pin": "hunter2"}, secret={"pin"})


@pytest.mark.parametrize(
    ("declaration", "text"),
    [
        ("fid:itn", r"fid: no type 'itn' \(did you mean int\?\)"),
        ("a b a:int", "a is declared twice"),
        ("x:choice", r"x: choice\(a,b\) takes its values in brackets"),
        ("x:choice()", r"x: choice\(a,b\) takes its values in brackets"),
        ("x:int(1)", r"x: choice\(a,b\) takes its values in brackets"),
        ("x:int=abc", "x: the default 'abc' is not a whole number"),
        ("x:choice(a,b)=c", "x: the default 'c' is not one of a, b"),
        ("a b:int,c", "'b:int,c' is not name:type"),
        ("a:", "'a:' is not name:type"),
        ("1a", "'1a' is not name:type"),
    ],
)
def test_a_fault_in_a_declaration_names_the_parameter(declaration: str, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ParamSpec.parse(declaration)


def test_only_what_looks_alike_is_suggested() -> None:
    assert suggest("concurent", ["enabled", "concurrent"]) == " (did you mean concurrent?)"
    assert suggest("xyz", ["enabled", "concurrent"]) == ""


def test_placeholders_are_named_once_in_their_order() -> None:
    assert names_in("cp --mode={mode} {b} '{a} {{no}}' {b}") == ["mode", "b", "a"]


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ("", "is empty"),
        ("echo 'a", "No closing quotation"),
        ("awk '{print $1}' {file}", "lone brace"),
        ("echo }", "lone brace"),
        ("{program} x", "program itself"),
        ("sh -c 'echo {x}'", "would run as code"),
        ("/usr/bin/env bash -ec {x}", "would run as code"),
    ],
)
def test_a_command_that_cannot_be_safe_is_refused(command: str, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        split_command(command)


def test_a_shell_script_gets_values_as_arguments() -> None:
    words = split_command("""sh -c 'printf %s "$1"' sh {x}""")
    done = subprocess.run(argv(words, {"x": "a; echo $(id)"}), capture_output=True, check=True)
    assert done.stdout == b"a; echo $(id)"


def test_each_word_is_one_argument_and_double_braces_are_braces() -> None:
    words = split_command("resize --size={size} 'a {path}' {{x}} {flag} {more}")
    filled = argv(words, {"path": "b c", "size": 20, "flag": True, "more": {"k": "ä"}})
    assert filled == ["resize", "--size=20", "a b c", "{x}", "true", '{"k": "ä"}']


def test_a_word_whose_parameter_is_not_given_is_left_out() -> None:
    words = split_command("ls --sort={sort} {path}")
    assert argv(words, {"path": "/"}) == ["ls", "/"]
    assert argv(words, {"path": "/", "sort": ""}) == ["ls", "--sort=", "/"]


@pytest.mark.parametrize(
    ("command", "params"),
    [
        ("rm {a}", {"a": "-rf"}),
        ("rm {a}", {"a": -1}),
        ("rm {a}{b}", {"a": "", "b": "-rf"}),
        ("rm {a}-rf", {"a": ""}),
        ("rm {a} --", {"a": "-rf"}),
        ("rm x--y {a}", {"a": "-rf"}),
    ],
)
def test_a_value_cannot_become_an_option(command: str, params: dict[str, Any]) -> None:
    with pytest.raises(BadParams, match=r"^a: a value that begins with '-' is not accepted$"):
        argv(split_command(command), params)


@pytest.mark.parametrize(
    ("command", "last"),
    [("rm -- {a}", "-rf"), ("rm --size={a}", "--size=-rf"), ("rm -{a}", "--rf")],
)
def test_a_value_may_begin_with_a_dash_where_it_cannot_be_an_option(
    command: str, last: str
) -> None:
    assert argv(split_command(command), {"a": "-rf"})[-1] == last


def test_a_value_of_a_type_that_allows_it_may_begin_with_a_dash() -> None:
    words = split_command("resize {a} {b}")
    assert argv(words, {"a": -5, "b": "x"}, {"a"}) == ["resize", "-5", "x"]
    with pytest.raises(BadParams, match=r"^b: a value that begins with '-'"):
        argv(words, {"a": -5, "b": "-x"}, {"a"})


def test_a_template_is_filled_or_is_none() -> None:
    assert filled("{{a}} = {a}, {b}", {"a": "x y", "b": 2}) == "{a} = x y, 2"
    assert filled("{a} {b}", {"a": "x"}) is None
    assert filled("", {}) == ""


@pytest.mark.parametrize("value", ["..", ".", "", "a/b", "/etc", "../x"])
def test_a_value_cannot_lead_out_of_a_folder(value: str) -> None:
    with pytest.raises(BadParams, match=r"^name: .* is not the name of a folder$"):
        folder("/srv/{name}", {"name": value})
    with pytest.raises(BadParams, match=r"^name: .* is not the name of a folder$"):
        folder("{path}/{name}", {"path": "/srv", "name": value})


def test_a_folder_may_be_a_path_that_is_given() -> None:
    assert folder("/srv/{name}", {"name": "..a"}) == "/srv/..a"
    assert folder("{path}", {"path": "/srv/a"}) == "/srv/a"
    assert folder("/srv", {}) == "/srv"


def test_a_nul_is_refused() -> None:
    with pytest.raises(BadParams, match=r"^a: holds a NUL character$"):
        argv(split_command("echo x{a}"), {"a": "\0"})


_ANY_TEXT = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"))


@given(_ANY_TEXT)
def test_any_text_reaches_the_program_as_one_argument(text: str) -> None:
    assert argv(split_command("echo -- {a} ={a}"), {"a": text}) == ["echo", "--", text, f"={text}"]


@pytest.mark.parametrize(
    "payload",
    ["; touch canary", "| touch canary", "$(touch canary)", "`touch canary`", "x\ntouch canary"],
)
def test_nothing_in_a_value_is_run(payload: str, tmp_path: Path) -> None:
    words = argv(split_command("printf %s -- {a}"), {"a": payload})
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, check=True)
    assert done.stdout.endswith(payload.encode())
    assert not list(tmp_path.iterdir())


# Of classes


def of(folder: Path, body: str) -> ParamSpec | None:
    """What a class with this body declares."""
    head = "from __future__ import annotations\nfrom pathlib import Path\nfrom typing import *\n"
    file = folder / "somebody.py"
    file.write_text(f"{head}class Job:\n{indent(body, '    ')}\n")
    spec = spec_from_file_location("somebody", file)
    assert spec and spec.loader
    sys.modules["somebody"] = module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return ParamSpec.of(module.Job)


def test_annotations_declare_what_an_ini_would(tmp_path: Path) -> None:
    spec = of(
        tmp_path,
        """fid: int
path: Path | None = None
mode: Literal["fast", "full"] = "fast"
ratio: float = 0.5
force: bool = False
more: dict[str, int] | None
names: list = []
what: Any
said: Optional[str]
note: str = "two words"
_own: int = 3
LIMIT: ClassVar[int] = 5
plain = 7""",
    )
    assert str(spec) == (
        "fid:int path:path? mode:choice(fast,full)=fast ratio:float=0.5 force:bool=false"
        ' more:json? names:json=[] what:any said? note="two words"'
    )
    assert spec and ParamSpec.parse(str(spec)).names == spec.names
    assert of(tmp_path, "plain = 7") is None


def test_a_base_declares_for_all_and_a_class_may_change_it() -> None:
    class Base:
        fid: int
        mode: str = "a"

    class Job(Base):
        fid: int = 5  # type: ignore[misc]
        more: bool = True

    assert str(ParamSpec.of(Job)) == "fid:int=5 mode=a more:bool=true"


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("when: set[str]", "when: set"),
        ("n: Literal[1, 2]", "n: "),
        ("a: int | str", "a: int | str is none of str, int"),
        ("fid: int = 'x'", "fid: the default 'x' is not a whole number"),
        ("fid: Nothing", "annotations of Job: name 'Nothing' is not defined"),
        ("path: Path = Path('here')", "path: the default"),
    ],
)
def test_annotations_that_declare_nothing_are_faults(body: str, text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        of(tmp_path, body)
    assert str(caught.value).startswith(text)


def test_a_declaration_is_spelt_as_it_was() -> None:
    text = 'fid:int path:path? level:choice(a,b)=a note="two words" x:float=1.5 ok:bool=true'
    assert str(ParamSpec.parse(text)) == text
    assert ParamSpec.parse(str(ParamSpec.parse(text))) == ParamSpec.parse(text)
