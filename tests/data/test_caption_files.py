import json

import pytest

from nanodiff.data import caption_files
from nanodiff.errors import UserError

FILES = ["a/1.png", "a/2.png", "b/3.png"]


@pytest.fixture
def root(tmp_path):
    for file in FILES:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    return tmp_path


def test_folder_names_are_captions_when_nothing_better_is_there(root):
    assert caption_files.find(root, FILES) == ["a", "a", "b"]
    assert caption_files.find(root, ["1.png"]) is None
    assert caption_files.find(root, FILES, None) is None


def test_text_files_beside_the_pictures_come_first(root):
    for number, file in enumerate(FILES):
        (root / file).with_suffix(".txt").write_text(f"picture\n number {number} \n")
    assert caption_files.find(root, FILES) == ["picture number 0", "picture number 1", "picture number 2"]
    (root / "a/2.txt").unlink()
    with pytest.raises(UserError, match="1 of 3 pictures in .* no caption in 'txt' .*a/2.png"):
        caption_files.find(root, FILES)


def test_json_lines_are_paired_by_name_not_by_place(root):
    rows = [{"file_name": file, "text": f"text of {file}"} for file in reversed(FILES)]
    (root / "metadata.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows))
    assert caption_files.find(root, FILES) == [f"text of {file}" for file in FILES]
    (root / "metadata.jsonl").write_text('{"file_name": "a/1.png", "text": "x"}\n{broken')
    with pytest.raises(UserError, match="line 2 of .*metadata.jsonl is not a JSON object"):
        caption_files.find(root, FILES)


def test_a_csv_may_hold_commas_quotes_line_breaks_and_a_byte_order_mark(root):
    table = 'caption,filename\n"a ""fine"", long\nweave",b/3.png\nplain,a/1.png\nä,a/2.png\n'
    (root / "my.csv").write_text(table, encoding="utf-8-sig")
    assert caption_files.find(root, FILES, "my.csv") == ["plain", "ä", 'a "fine", long\nweave']
    assert caption_files.find(root, FILES, str(root / "my.csv")) == caption_files.find(root, FILES, "my.csv")


def test_a_table_that_names_no_picture_or_lacks_a_column_is_refused(root):
    (root / "metadata.csv").write_text("file_name,text\na/l.png,x\n")
    with pytest.raises(UserError, match="entry 1 .* names 'a/l.png'; expected .*nearest: a/[12].png"):
        caption_files.find(root, FILES)
    (root / "metadata.csv").write_text("file_name,label\na/1.png,x\n")
    with pytest.raises(UserError, match=r"\['file_name', 'label'\]; expected .*text, caption, prompt"):
        caption_files.find(root, FILES)
    (root / "metadata.csv").write_text("file_name,text\na/1.png,x\n")
    with pytest.raises(UserError, match="2 of 3 pictures .*first is a/2.png"):
        caption_files.find(root, FILES)
    with pytest.raises(UserError, match="'nothing.csv' is neither"):
        caption_files.find(root, FILES, "nothing.csv")
