import json
import logging

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmtransfer.config import DataConfig, speech_columns, text_columns
from mmtransfer.data.tables import iter_rows, numbered_rows
from mmtransfer.errors import UserError
from mmtransfer.speech.clips import read_clips
from mmtransfer.text.examples import check_labels, label_names, read_texts

CONFIG = DataConfig()


def write(path, content):
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def refusal(source):
    with pytest.raises(UserError) as caught:
        list(iter_rows(source))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def texts_of(source):
    return [clip.text for clip in read_clips(source, CONFIG)]


# --- cells ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        ("file_name,transcription\na.wav,one two, three\n", 2, "expected 2 cells .* found 3"),
        (
            "file_name,transcription,group\na.wav,x,g\nb.wav,one, two,g\n",
            3,
            "expected 3 cells .* found 4",
        ),
        (
            "file_name,transcription,language\na.wav,x,en\nb.wav, y,en,zh\n",
            3,
            "expected 3 cells .* found 4",
        ),
        ("file_name,transcription\na.wav,x\nb.wav\n", 3, "expected 2 cells .* found 1"),
        (
            "file_name,transcription,group\na.wav,hello\nthere,gate\n",
            2,
            "expected 3 cells .* found 2",
        ),
    ],
)
def test_rows_of_another_width_are_refused_with_their_line(tmp_path, content, line, message):
    source = write(tmp_path / "m.csv", content)
    with pytest.raises(UserError, match=rf"m\.csv:{line}: {message}"):
        read_clips(source, CONFIG)
    with pytest.raises(UserError, match=rf"m\.csv:{line}: {message}"):
        read_texts(
            source, DataConfig(text_column="transcription", label_column="file_name"), name="x"
        )


@pytest.mark.parametrize(
    "content",
    [
        'file_name,transcription\na.wav,"one two, three"\n',
        "file_name,transcription\na.wav,one two& three,\n".replace("&", " "),
        'file_name , "transcription" ,,\na.wav,one two  three,,\n',
        "\ufefffile_name,transcription\r\na.wav,one two three\r\n\r\n",
    ],
)
def test_quotes_blank_cells_and_blanks_in_the_header_do_no_harm(tmp_path, content):
    [text] = texts_of(write(tmp_path / "m.csv", content))
    assert text.replace(",", "") == "one two three"


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('file_name,transcription\na.wav,"hello\nb.wav,there"\nc.wav,x\n', 2),
        ('file_name,transcription\na.wav,x\nb.wav,"hello\nc.wav,there\nd.wav,"\n', 3),
        ('id,text,label\n1,fine,x\n2,"bad,y\n3,fine,x\n4,good",y\n5,x,x\n', 3),
        ('text,label\nfine,x\n"bad,y\nfine,x\n', 3),
        ('text,label\nfine,x\n"bad" indeed,y\nfine,x\n', 3),
    ],
)
def test_a_quote_that_swallows_rows_is_refused_where_it_begins(tmp_path, content, line):
    message = refusal(write(tmp_path / "a.csv", content))
    assert f"a.csv:{line}: " in message
    assert "quote" in message


@pytest.mark.parametrize(
    "cell",
    ["Advertisement\nConsider that the port, as of today, is closed.", "a\n\nb", "x\ny\n", "1,\n2"],
)
def test_cells_with_line_breaks_stay(tmp_path, cell):
    rows = "".join(f"plain {i},about,{'yn'[i % 2]},g{i}\n" for i in range(20))
    quoted = f'text,target,label,group\n{rows}"{cell}",about,y,g7\nlast,about,n,g8\n'
    found = list(numbered_rows(write(tmp_path / "a.csv", quoted)))
    assert found[20][1] == {"text": cell, "target": "about", "label": "y", "group": "g7"}
    assert found[21][0] == 23 + cell.count("\n")


def test_tables_with_tabs_hold_quotes_that_mean_themselves_and_cells_that_libraries_quote(tmp_path):
    content = (
        'path\tsentence\n1.mp3\t"Halt!" rief er.\n2.mp3\t"\n3.mp3\t"a\tb\n""c"""\n4.mp3\t"d"\n'
    )
    rows = list(numbered_rows(write(tmp_path / "a.tsv", content)))
    assert [row["sentence"] for _, row in rows] == ['"Halt!" rief er.', '"', 'a\tb\n"c"', "d"]
    assert [line for line, _ in rows] == [2, 3, 4, 6]
    assert "a.tsv:3: expected 2 cells" in refusal(
        write(tmp_path / "a.tsv", "path\tsentence\n1.mp3\tx\n2.mp3 y\n")
    )


@pytest.mark.parametrize("mark", ['"', ""], ids=["closed later", "never closed"])
@pytest.mark.parametrize(("above", "behind"), [("", "\t"), ("\t", "")])
def test_lines_looked_at_for_the_end_of_a_quote_stay_rows(tmp_path, mark, above, behind):
    texts = ['"Hello he said', "second", "third", f"fourth {mark}yes", "fifth"]
    rows = "".join(f"{text}\tpos{behind}\n" for text in texts)
    content = f"text\tlabel{above}\n{rows}"
    found = list(numbered_rows(write(tmp_path / "a.tsv", content)))
    assert [(line, row["text"]) for line, row in found] == list(enumerate(texts, 2))


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.parquet"])
def test_repeated_names_of_columns_are_refused(tmp_path, name):
    path = tmp_path / name
    if name == "a.parquet":
        pq.write_table(pa.table([["a"], ["b"]], names=["text", "text"]), path)
    else:
        mark = {"a.csv": ",", "a.tsv": "\t"}.get(name)
        write(path, f"text{mark} text\na{mark}b\n" if mark else '{"text": "a", "text": "b"}\n')
    assert "column 'text' occurs more than once" in refusal(str(path))


def test_columns_without_a_name_may_repeat(tmp_path):
    assert list(iter_rows(write(tmp_path / "a.csv", "text,,\na,,\n"))) == [{"text": "a", "": ""}]
    assert list(iter_rows(write(tmp_path / "a.jsonl", '{"text": "a", "": 1, "": 2}'))) == [
        {"text": "a", "": 2}
    ]


# --- JSON and Parquet ----------------------------------------------------------------------------


def test_speech_rows_of_json_hold_text_and_their_keys(tmp_path):
    def rows(*objects):
        lines = [json.dumps(o, ensure_ascii=False) for o in objects]
        return write(tmp_path / "m.jsonl", "\n".join(lines))

    one = {"file_name": "a.wav", "transcription": "hello\u2028there\u0085you"}
    assert texts_of(rows(one)) == ["hello there you"]
    assert texts_of(rows(one | {"transcription": 7.0})) == ["7"]
    assert texts_of(rows(one | {"transcription": ""}, one | {"transcription": None})) == ["", ""]
    with pytest.raises(UserError, match=r"m\.jsonl:2: 'transcription' is missing"):
        texts_of(rows(one, {"file_name": "b.wav", "text": "x"}))
    for value, found in (([], "list"), ({"en": "x"}, "dict")):
        with pytest.raises(UserError, match=rf"m\.jsonl:1: column 'transcription'.* a {found}"):
            texts_of(rows(one | {"transcription": value}))
    with pytest.raises(UserError, match=r"m\.jsonl:1: column 'start': expected seconds"):
        texts_of(rows(one | {"start": True}))


@pytest.mark.parametrize(
    "content",
    [
        {"text": {"0": "a", "1": "b"}, "label": {"0": "x", "1": "y"}},
        {"text": ["a", "b"], "label": ["x", "y"]},
        {"columns": ["text"], "index": [0], "data": [["a"]]},
    ],
)
def test_whole_columns_in_one_json_object_are_refused(tmp_path, content):
    message = refusal(write(tmp_path / "a.json", json.dumps(content)))
    assert "a.json:1: the object holds whole columns" in message
    assert "lines=True" in message


def class_table(labels):
    features = {
        "text": {"_type": "Value"},
        "label": {"names": ["no", "yes"], "_type": "ClassLabel"},
    }
    table = pa.table({"text": [f"t{i}" for i in range(len(labels))], "label": labels})
    noted = json.dumps({"info": {"features": features}})
    return table.replace_schema_metadata({"huggingface": noted})


def test_numbers_of_classes_in_parquet_are_their_names(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(class_table([0, 1, -1, None]), path)
    read = read_texts(str(path), CONFIG, name="train")
    assert [e.label for e in read.examples] == ["no", "yes"]
    assert len(read.skipped) == 2
    pq.write_table(class_table([0, 2]), path)
    assert "a.parquet:2: column 'label': expected a class from 0 to 1, found 2" in refusal(
        str(path)
    )
    pq.write_table(class_table([0, 1]).replace_schema_metadata({"huggingface": "{}"}), path)
    assert label_names(read_texts(str(path), CONFIG, name="train")) == ["0", "1"]


def test_a_header_that_comes_again_is_left_out_and_said(tmp_path, caplog):
    for name, content in (
        ("a.csv", "text,label\na,x\ntext,label\nb,y\ntext, label \n"),
        ("a.tsv", "text\tlabel\na\tx\ntext\tlabel\nb\ty\ntext\tlabel\n"),
    ):
        read = read_texts(write(tmp_path / name, content), CONFIG, name="train")
        assert [e.text for e in read.examples] == ["a", "b"]
        assert f"{name}: the header comes again as data, in lines 3, 5" in caplog.text
    [row] = iter_rows(write(tmp_path / "b.csv", "text\ntext\n"))  # of one column it may be a text
    assert row == {"text": "text"}


# --- roles ---------------------------------------------------------------------------------------


def test_a_column_has_one_role(tmp_path, caplog):
    with pytest.raises(UserError, match=r"data\.label_column and data\.target_column are the same"):
        text_columns(DataConfig(label_column="mood", target_column="mood"))
    with pytest.raises(UserError, match=r"data\.text_column and data\.label_column are the same"):
        text_columns(DataConfig(label_column="text"))
    with pytest.raises(UserError, match=r"data\.text_column and data\.group_column are the same"):
        speech_columns(DataConfig(text_column="said", group_column="said"))
    with pytest.raises(UserError, match=r"data\.file_column and data\.text_column are the same"):
        speech_columns(DataConfig(file_column="transcription"))
    with caplog.at_level(logging.INFO):
        columns = text_columns(DataConfig(label_column="target", text_column="group"))
    assert columns == {
        "text_column": "group",
        "label_column": "target",
        "target_column": None,
        "group_column": None,
    }
    assert "column 'target' is data.label_column; no target column is used" in caplog.text
    assert speech_columns(DataConfig(text_column="language"))["language_column"] is None
    assert speech_columns(DataConfig(language_column="tongue"))["group_column"] == "group"


def test_a_role_can_be_switched_off(tmp_path):
    content = "text,label,target,group\na,x,t,g\n"
    config = DataConfig(target_column="none", group_column="none")
    [example] = read_texts(write(tmp_path / "a.csv", content), config, name="x").examples
    assert (example.target, example.group) == (None, None)


def test_a_label_in_the_default_target_column_is_not_fed_to_the_model(tmp_path):
    content = "id,text,target\n" + "".join(f"{i},word{i},{i % 2}\n" for i in range(20))
    config = DataConfig(label_column="target")
    read = read_texts(write(tmp_path / "a.csv", content), config, name="train")
    assert {example.target for example in read.examples} == {None}


@pytest.mark.parametrize("column", ["target", "group", "text"])
def test_a_column_that_stands_for_the_label_is_warned_of(tmp_path, caplog, column):
    rows = [{"text": f"t{i}", "label": "ab"[i % 2], "target": f"x{i}"} for i in range(12)]
    lines = [json.dumps(row | {column: f"is {row['label']}"}) for row in rows]
    read_texts(write(tmp_path / "a.jsonl", "\n".join(lines)), CONFIG, name="train")
    assert f"column '{column}' determines the label one to one" in caplog.text
    caplog.clear()
    lines = [json.dumps(row | {column: f"is {i % 3}"}) for i, row in enumerate(rows)]
    read_texts(write(tmp_path / "a.jsonl", "\n".join(lines)), CONFIG, name="train")
    assert "one to one" not in caplog.text


# --- labels --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "labels",
    [
        ("positive", "Positive"),
        ("1", "1.0"),
        ("ja", "јa"),  # Cyrillic
        ("good", "ｇｏｏｄ"),
        ("very good", "very_good"),
        ("good", "good."),
        ("good", "go\u200bod"),
    ],
)
def test_classes_that_look_alike_are_refused_with_their_lines(tmp_path, labels):
    content = "text,label\n" + "".join(f"t{i},{labels[i // 3]}\n" for i in range(6)) + "x,other\n"
    read = read_texts(write(tmp_path / "a.csv", content), CONFIG, name="train")
    with pytest.raises(UserError, match=r"\(3, first a\.csv:[25]\).* look alike"):
        label_names(read)


def test_classes_that_differ_stay(tmp_path):
    labels = ["-1", "0", "1", "1.5", "10", "C", "C++", "C#", "not good", "notgood"]
    content = "text,label\n" + "".join(f"t{i},{label}\n" for i, label in enumerate(labels))
    read = read_texts(write(tmp_path / "a.csv", content), CONFIG, name="train")
    assert len(label_names(read)) == len(labels)
    other = read_texts(write(tmp_path / "b.csv", "text,label\na,c\n"), CONFIG, name="x")
    with pytest.raises(UserError, match=r"found 'c' \(like 'C'\)"):
        check_labels(other, labels, where="x")


# --- languages -----------------------------------------------------------------------------------


def test_languages_are_read_by_name_and_checked_with_their_line(tmp_path):
    rows = ["English", "en-US", "ZH-cn", "", "deu"]
    content = "file_name,transcription,language\n" + "".join(f"a.wav,x,{row}\n" for row in rows)
    clips = read_clips(write(tmp_path / "m.csv", content), CONFIG)
    assert [clip.language for clip in clips] == ["en", "en", "zh", None, "de"]
    with pytest.raises(UserError, match=r"m\.csv:7: column 'language': expected a language"):
        read_clips(write(tmp_path / "m.csv", content + "a.wav,x,klingon\n"), CONFIG)
    off = DataConfig(language_column="none")
    assert read_clips(write(tmp_path / "m.csv", content), off)[2].language is None


def test_the_language_of_the_data_is_one_code():
    assert [DataConfig(language=name).language for name in ("English", "zh-TW", "auto")] == [
        "en",
        "zh",
        "auto",
    ]
    assert DataConfig(language=False).language == "no"  # as YAML has it
    with pytest.raises(ValueError, match="expected a language"):
        DataConfig(language="xx")
