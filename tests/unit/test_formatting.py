"""Text of models reaches a terminal as text."""

from megatron_s2d.formatting import printable


def test_control_characters_are_written_out():
    hostile = "a\x1b[31mred\x1b]0;title\x07\r\x08b\x9b2J\u202e\tc\nd é 数"
    assert printable(hostile) == "a\\x1b[31mred\\x1b]0;title\\x07\\r\\x08b\\x9b2J\\u202e\tc\nd é 数"
