"""Prompts from the command line, from files and from a person."""

import io
import json
import os
import signal
import sys
from argparse import ArgumentParser

import pytest

from maskmoe.errors import UserError
from maskmoe.prompts import PromptLoop, Prompts, add_prompt_arguments, read_prompts


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


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("--prompt", "a", "--interactive"),
        ("--prompts-file", "f", "--prompt", "a"),
        ("--prompt", "a", "--batch-size", "0"),
    ],
)
def test_bad_arguments_are_refused(words, capsys):
    with pytest.raises(SystemExit):
        parse(*words)
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize("prompt", ["", " \n"])
def test_empty_prompt_is_refused(prompt):
    with pytest.raises(UserError, match="--prompt is empty"):
        Prompts(parse("--prompt", prompt))


@pytest.fixture
def loop(monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(sys, "stdin", io.StringIO("first\n\nsecond\n"))
    yield PromptLoop()
    signal.signal(signal.SIGINT, before)


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


def test_waiting_for_a_prompt_has_a_limit(loop):
    assert [loop.next(), loop.next(), loop.next()] == ["first", "second", None]
    with pytest.raises(TimeoutError):
        loop.next(0.01)
