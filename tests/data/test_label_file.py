"""``labels.txt`` as people write it, and every line that is none by its number."""

import pytest

from r2d2fast.data.errors import DataError
from r2d2fast.data.label_file import read_labels

NAMES = ["a.jpg", "my photo.jpg", "deep/b, c.png", "photo"]
EXPECTED = {"a.jpg": "golden retriever", "my photo.jpg": "cat", "deep/b, c.png": "cat"}


def read(tmp_path, text, **options):
    path = tmp_path / "labels.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_labels(path, NAMES, **options)


@pytest.mark.parametrize(
    "text",
    [
        "a.jpg golden retriever\nmy photo.jpg cat\ndeep/b, c.png cat\n",
        "a.jpg\tgolden retriever\nmy photo.jpg\tcat\ndeep/b, c.png\tcat",
        'a.jpg,golden retriever\n my photo.jpg , cat \n"deep/b, c.png",cat\n',
        "a.jpg;golden retriever\nmy photo.jpg;cat\ndeep/b, c.png;cat\n",
        b"\xef\xbb\xbfa.jpg,golden retriever\r\n\r\nmy photo.jpg,cat\r\n\"deep/b, c.png\",cat\r\n",
        "filename,class\na.jpg,golden retriever\nmy photo.jpg,cat\n\"deep\\b, c.png\",cat",
        "image    label\n./a.jpg    golden retriever\nmy photo.jpg   cat\rdeep/b, c.png   cat",
    ],
    ids=["spaces", "tabs", "commas", "semicolons", "Windows", "headings", "columns"],
)  # fmt: skip
def test_the_same_labels_in_every_form(tmp_path, text):
    assert read(tmp_path, text) == EXPECTED


def test_lines_of_other_images_may_be_left_out(tmp_path):
    assert read(tmp_path, "a.jpg,cat\nz.jpg,dog\n", missing_ok=True) == {"a.jpg": "cat"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.jpg,cat\n\nmy photo.jpg\n", r"line 3: 'my photo\.jpg' is not 'FILENAME CLASS'; accepted: .* comma, a tab"),
        ("a.jpg\n", r"line 1: 'a\.jpg' is not 'FILENAME CLASS'"),
        ("a.jpg,cat\nmy photo.jpg,\n", r"line 2: 'my photo\.jpg,' is not"),
        ("a.jpg,cat,0.9\n", r"line 1: 'a\.jpg,cat,0\.9' is not"),
        (
            "a.jpg,cat\nz.jpg,dog\n",
            r"line 2: 'z\.jpg' is not there; remove the line, or add the image below .*like 'a\.jpg'",
        ),
        # No headings: a file name, and a second line.
        ("z.jpg,dog\na.jpg,cat\n", r"line 1: 'z\.jpg' is not there"),
        ("a.jpg,cat\nname,class\n", r"line 2: 'name' is not there"),
        ("a.jpg cat\nphone.heic cat\n", r"line 2: 'phone\.heic' is of a kind that is not read; convert the image"),
        ("a.jpg cat\na.jpg dog\n", r"line 2: 'a\.jpg' has class 'dog', but 'cat' before; keep one"),
        ("a.jpg,cat\n".encode("utf-16"), r"labels\.txt is not UTF-8 text .*; accepted: lines 'FILENAME CLASS'"),
    ],
)
def test_a_line_that_is_none_is_named_by_its_number(tmp_path, text, message):
    (tmp_path / "phone.heic").write_bytes(b"")
    with pytest.raises(DataError, match=message):
        read(tmp_path, text)
