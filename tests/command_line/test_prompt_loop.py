"""The loop over the prompts that a person types."""

import os
import signal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from maskmoe.command_line.prompt_loop import PromptLoop
from maskmoe.errors import UserError


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
