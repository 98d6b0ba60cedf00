"""Files of prompts."""

import json
import os
from pathlib import Path

from hypothesis import example, given
from hypothesis import strategies as st

from maskmoe.data.prompts import read_prompts


def test_plain_lines(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("one\n\n {not JSON} \n  \nthree", encoding="utf-8")
    assert read_prompts(path) == [{"prompt": "one"}, {"prompt": " {not JSON} "}, {"prompt": "three"}]


def test_json_lines_keep_their_keys(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a\\nb", "id": 7}\n\n{"prompt": "ü"}\n', encoding="utf-8")
    assert read_prompts(path) == [{"prompt": "a\nb", "id": 7}, {"prompt": "ü"}]


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


def test_file_may_be_a_pipe():
    reader, writer = os.pipe()
    os.write(writer, b"a\nb\n")
    os.close(writer)
    assert read_prompts(Path(f"/dev/fd/{reader}")) == [{"prompt": "a"}, {"prompt": "b"}]
    os.close(reader)
