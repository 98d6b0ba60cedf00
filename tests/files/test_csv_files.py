"""A CSV file can be read back."""

import csv

from maskmoe.files.csv_files import write_csv


def test_pieces_with_line_ends_are_quoted(tmp_path):
    pieces = ["\r", "\n", "a\r\nb", ",", '"', " "]
    write_csv(tmp_path / "pieces.csv", ["piece"], [[piece] for piece in pieces])
    with open(tmp_path / "pieces.csv", newline="", encoding="utf-8") as stream:
        assert stream.readline() == "piece\r\n"
        assert [piece for (piece,) in csv.reader(stream)] == pieces
