import pytest

from pregate.config import UsageError
from pregate.system.byte_sizes import human_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4GB", 4_000_000_000),
        ("512MiB", 512 * 2**20),
        ("1.5G", 1_500_000_000),
        ("1.5gib", 3 * 2**29),
        (" 20 kB ", 20_000),
        (".5T", 500_000_000_000),
        ("4096", 4096),
        ("17B", 17),
        (123, 123),
        ("9007199254740993", 9007199254740993),  # 2**53 + 1: a float would lose the last byte
    ],
)
def test_parse_bytes(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "-1", "4 apples", "25%", "1e9", "4PB", "nan", "4i", "1.2.3G", True])
def test_parse_bytes_refuses(text):
    with pytest.raises(UsageError, match="is not a size"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (4_718_592, "4.72 MB"),
        (47_185_920, "47.2 MB"),
        (999_600, "1.00 MB"),
        (25e9, "25.0 GB"),
        (3.2e15, "3200 TB"),
    ],
)
def test_human_bytes(size, expected):
    assert human_bytes(size) == expected
