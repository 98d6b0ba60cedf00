"""Prompts from the command line, from files and from a person."""

import json
import os
import signal
from argparse import ArgumentParser

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from maskmoe.errors import UserError
from maskmoe.training.inference.prompts import PromptLoop, Prompts, add_prompt_arguments, read_prompts


def parse(*words):
    parser = ArgumentParser()
    add_prompt_arguments(parser)
    return parser.parse_args([*map(str, words)])


def test_plain_lines(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("one\n\n {not JSON} \n  \nthree", encoding="utf-8")
    assert read_prompts(path) == [{"prompt": "one"}, {"prompt": " {not JSON} "}, {"prompt": "three"}]


def test_json_lines_keep_their_keys(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a\\nb", "id": 7}\n\n{"prompt": "ü"}\n', encoding="utf-8")
    prompts = Prompts(parse("--prompts-file", path, "--batch-size", "1"))
    assert prompts.texts == ["a\nb", "ü"]
    assert [prompts.texts[batch] for batch in prompts.batches()] == [["a\nb"], ["ü"]]
    lines = prompts.output(["a\nb c", "ü d"]).splitlines()
    assert [json.loads(line) for line in lines] == [
        {"prompt": "a\nb", "id": 7, "text": "a\nb c"},
        {"prompt": "ü", "text": "ü d"},
    ]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.text(min_size=1).filter(str.strip), min_size=1),
    line_end=st.sampled_from(["\n", "\r\n"]),
    byte_order_mark=st.booleans(),
)
@example(texts=["a\u2028b", "c\x85d", "e\x0cf\x0b\x1cg"], line_end="\n", byte_order_mark=True)
def test_only_line_feeds_end_a_line(tmp_path, texts, line_end, byte_order_mark):
    path, encoding = tmp_path / "prompts.jsonl", "utf-8-sig" if byte_order_mark else "utf-8"
    lines = (json.dumps({"prompt": text}, ensure_ascii=False) for text in texts)
    path.write_bytes(line_end.join(lines).encode(encoding))
    assert read_prompts(path) == [{"prompt": text} for text in texts]

    path = tmp_path / "prompts.txt"
    texts = [text for part in texts if (text := part.replace("\n", "").rstrip("\r")).strip()] or ["a"]
    path.write_bytes(line_end.join(texts).encode(encoding))
    assert read_prompts(path) == [{"prompt": text} for text in texts]


def test_one_prompt_is_printed_as_text():
    prompts = Prompts(parse("--prompt", "a"))
    assert (prompts.texts, prompts.output(["a b"])) == (["a"], "a b")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "line 1 of --prompts-file .* is not JSON"),
        (b'{"prompt": "a"}\n[1]', "line 2 of --prompts-file .* is not a JSON object"),
        (b'{"prompt": 1}', "has no text"),
        (b'{"prompt": ""}', "has no text"),
        (b'{"prompt": " "}', "has no text"),
        (b'{"text": "a"}', "has no text"),
        (b"[" * 100_000, "line 1 .* is not JSON"),
        (b"\xff\n", "is not text in UTF-8"),
        (b'{"prompt": "a"}\n{"prompt": "\\ud800"}', "line 2 of .* half of a surrogate pair"),
        (b'{"prompt": "a", "id": {"\\udcff": 1}}', "line 1 of .* half of a surrogate pair"),
        (b"\n \n", "holds no text"),
        (None, "cannot read --prompts-file .*: No such file or directory"),
    ],
)
def test_bad_files_are_refused(tmp_path, content, message):
    path = tmp_path / "prompts.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as refusal:
        read_prompts(path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("prompt", ["", " \n"])
def test_empty_prompt_is_refused(prompt):
    with pytest.raises(UserError, match="--prompt is empty"):
        Prompts(parse("--prompt", prompt))


def test_prompt_of_invalid_bytes_is_refused():
    with pytest.raises(UserError, match=r"^--prompt has an invalid byte .*'\\udcff'"):
        Prompts(parse("--prompt", os.fsdecode(b"a\xff")))


@pytest.fixture
def start_loop(tmp_path):
    """A function that makes some bytes, or an open file, the standard input, and returns the loop over its prompts."""
    saved, before = os.dup(0), signal.getsignal(signal.SIGINT)

    def start(content: bytes | int) -> PromptLoop:
        if isinstance(content, bytes):
            (tmp_path / "typed").write_bytes(content)
            content = os.open(tmp_path / "typed", os.O_RDONLY)
        os.dup2(content, 0)
        os.close(content)
        return PromptLoop()

    yield start
    os.dup2(saved, 0)
    os.close(saved)
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def loop(start_loop):
    return start_loop(b"first\n\nsecond\n")


def test_loop_shows_growing_texts(loop, capfd):
    assert loop.next() == "first"
    with loop.answering():
        for text in ("first", "first a", "first a\ufffd", "first aé"):
            loop.show(text)
    assert loop.next() == "second"
    assert loop.next() is None
    assert capfd.readouterr() == ("first aé\n", "")


def test_interrupt_ends_only_the_text_in_progress(loop, capfd):
    os.kill(os.getpid(), signal.SIGINT)
    assert "Ctrl-D ends the program" in capfd.readouterr().err
    with loop.answering():
        assert not loop.is_interrupted
        os.kill(os.getpid(), signal.SIGINT)
        assert loop.is_interrupted
    with loop.answering():
        assert not loop.is_interrupted


def test_typed_lines_that_are_not_text_are_refused(start_loop, capfd):
    loop = start_loop(b"\xef\xbb\xbfdef f\r\ncaf\xe9\n\xff\na\x0cb\n")
    assert [loop.next(), loop.next(), loop.next()] == ["def f", "a\x0cb", None]
    errors = capfd.readouterr().err.splitlines()
    assert [line.partition("(")[2][:8] for line in errors] == [r"'\udce9'", r"'\udcff'"]
    assert all(line.startswith("error: the prompt has an invalid byte") for line in errors)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(st.text()), has_line_end=st.booleans(), byte_order_mark=st.booleans())
def test_each_line_that_is_not_empty_is_a_prompt(start_loop, lines, has_line_end, byte_order_mark):
    lines = [part for line in lines for part in line.lstrip("\ufeff").split("\n")]
    text = "\n".join(lines) + "\n" * has_line_end
    loop = start_loop(text.encode("utf-8-sig" if byte_order_mark else "utf-8"))
    assert [*iter(loop.next, None)] == [prompt for line in lines if (prompt := line.rstrip("\r"))]


def test_input_that_cannot_be_read_is_refused(start_loop, tmp_path):
    loop = start_loop(os.open(tmp_path / "typed", os.O_WRONLY | os.O_CREAT))
    with pytest.raises(UserError, match=r"^cannot read prompts from stdin: Bad file descriptor$"):
        loop.next()
