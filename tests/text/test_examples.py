import csv
import json
import logging
import math
import threading
from collections import Counter
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import SHARED
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtransfer.config import DataConfig
from mmtransfer.data.tables import iter_rows
from mmtransfer.errors import UserError
from mmtransfer.text.examples import (
    TextExample,
    TextSet,
    check_labels,
    hold_out_texts,
    label_names,
    read_texts,
    refuse_text_leaks,
    text_leaks,
)

CONFIG = DataConfig()


def write(path, content):
    if isinstance(content, str):
        content = content.encode()
    path.write_bytes(content)
    return str(path)


def pairs(source, **settings_):
    read = read_texts(source, DataConfig(**settings_), name="train")
    return [(example.text, example.label) for example in read.examples]


def make_set(rows, name="train"):
    """A set from (text, label) or (text, label, target, group) rows."""
    return TextSet(
        name,
        [TextExample(*row, name=f"{name}.csv:{i}") for i, row in enumerate(rows, 2)],  # type: ignore[misc]
    )


# --- reading -------------------------------------------------------------------------------------


def test_one_set_in_every_file_format_reads_the_same(tmp_path):
    rows: list[dict[str, Any]] = [
        {"text": "good, very good", "label": "yes", "target": "food", "group": "a"},
        {"text": 'a "quoted"\nline', "label": "no", "target": None, "group": "b"},
        {"text": "很好 é", "label": "yes", "target": "服务", "group": None},
    ]
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    write(tmp_path / "a.jsonl", lines)
    write(tmp_path / "a.json", lines + "\n")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for suffix in ("csv", "jsonl", "json", "parquet"):
        read = read_texts(str(tmp_path / f"a.{suffix}"), CONFIG, name="train")
        assert [(e.text, e.label, e.target, e.group) for e in read.examples] == [
            ("good, very good", "yes", "food", "a"),
            ('a "quoted" line', "no", None, "b"),
            ("很好 é", "yes", "服务", None),
        ]
        assert read.skipped == []
        assert (read.name, len(read)) == ("train", 3)


def test_examples_are_named_by_the_line_on_which_they_begin(tmp_path):
    source = write(tmp_path / "a.csv", 'text,label\r\n"two\r\nlines",x\r\n\r\nlast,y\r\n')
    read = read_texts(source, CONFIG, name="train")
    assert [example.name for example in read.examples] == ["a.csv:2", "a.csv:5"]
    source = write(tmp_path / "a.jsonl", '{"text": "a", "label": 1}\n\n{"text": "b", "label": 2}')
    read = read_texts(source, CONFIG, name="train")
    assert [example.name for example in read.examples] == ["a.jsonl:1", "a.jsonl:3"]


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_byte_order_mark_and_line_endings_do_not_matter(tmp_path, ending, mark):
    lines = [mark + "text, label", "a\tb \u00a0 c,x", "d,y", ""]
    assert pairs(write(tmp_path / "a.csv", ending.join(lines))) == [("a b c", "x"), ("d", "y")]
    lines = [mark + '{"text": "a", "label": "x"}', '{"text": "d", "label": "y"}']
    assert pairs(write(tmp_path / "a.jsonl", ending.join(lines))) == [("a", "x"), ("d", "y")]


def test_line_separators_of_unicode_do_not_end_a_json_line(tmp_path):
    row = json.dumps({"text": "a\u2028b\u0085c", "label": "x"}, ensure_ascii=False)
    assert pairs(write(tmp_path / "a.jsonl", row)) == [("a b c", "x")]


def test_half_a_surrogate_pair_becomes_readable_text(tmp_path):
    [(text, _)] = pairs(write(tmp_path / "a.jsonl", '{"text": "ok \\ud83d", "label": "x"}'))
    assert text == "ok \ufffd"


def test_a_cell_of_ten_million_characters_and_the_process_wide_limit(tmp_path):
    before = csv.field_size_limit()
    source = write(tmp_path / "a.csv", f'text,label\nshort,x\n"{"long " * 2_000_000}",y\n')
    rows = iter_rows(source)
    next(rows)
    assert csv.field_size_limit() == before  # also while the generator waits
    assert len(next(rows)["text"]) == 10_000_000
    assert csv.field_size_limit() == before


def test_threads_read_long_cells_at_the_same_time(tmp_path):
    before = csv.field_size_limit()
    content = "text,label\n" + f"{'x' * 200_000},y\n" * 40
    sources = [write(tmp_path / f"{i}.csv", content) for i in range(4)]
    counts = []
    threads = [
        threading.Thread(target=lambda s=source: counts.append(len(list(iter_rows(s)))))
        for source in sources
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts == [40] * 4
    assert csv.field_size_limit() == before


def test_rows_come_before_the_file_is_read_to_its_end(tmp_path):
    good = b"text,label\n" + b"a,x\n" * 100_000
    rows = iter_rows(write(tmp_path / "a.csv", good + b"caf\xe9,x\n"))
    assert next(rows) == {"text": "a", "label": "x"}
    with pytest.raises(UserError, match=r"a\.csv:100002: not UTF-8 \(byte 4 of the line"):
        list(rows)
    table = pa.table({"text": [f"t{i}" for i in range(10)]})
    pq.write_table(table, tmp_path / "a.parquet")
    read = list(iter_rows(str(tmp_path / "a.parquet"), chunk=3))
    assert [row["text"] for row in read] == table["text"].to_pylist()


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([0, 1], ["0", "1"]),
        ([0.0, 1.0], ["0", "1"]),
        ([0.5, 2.0], ["0.5", "2"]),
        ([True, False], ["true", "false"]),
        ([" very  good ", "bad"], ["very good", "bad"]),
    ],
)
def test_labels_are_text(tmp_path, values, labels):
    pq.write_table(pa.table({"text": ["a", "b"], "label": values}), tmp_path / "a.parquet")
    lines = [json.dumps({"text": "a", "label": value}) for value in values]
    write(tmp_path / "a.jsonl", "\n".join(lines))
    for suffix in ("parquet", "jsonl"):
        assert [label for _, label in pairs(str(tmp_path / f"a.{suffix}"))] == labels


def test_rows_without_text_or_label_are_skipped_named_and_counted(tmp_path, caplog):
    content = "text,label\n" + "good,x\n" + "   ,x\n" + "no label,\n" + "neither,\n" + ",\n"
    with caplog.at_level(logging.WARNING):
        read = read_texts(write(tmp_path / "a.csv", content), CONFIG, name="train")
    assert [example.text for example in read.examples] == ["good"]
    assert read.skipped == [
        "a.csv:3: column 'text' is empty.",
        "a.csv:4: column 'label' is empty.",
        "a.csv:5: column 'label' is empty.",
        "a.csv:6: column 'text' is empty.",
    ]
    assert "a.csv:5" in caplog.text
    assert "a.csv:6" not in caplog.text
    assert "1 more rows of 'train'" in caplog.text


def test_null_and_nan_cells_are_empty(tmp_path):
    table = pa.table(
        {
            "text": ["a", None, "c", "d"],
            "label": pa.array([1.0, 1.0, None, math.nan]),
            "target": [None, "x", "y", "z"],
            "group": pa.array([7.0, None, None, None]),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    read = read_texts(str(tmp_path / "a.parquet"), CONFIG, name="train")
    assert read.examples == [TextExample("a", "1", None, "7", "a.parquet:1")]
    assert len(read.skipped) == 3


def test_columns_are_named_by_the_configuration(tmp_path):
    content = "review,stars,about,shop\nfine,5,tea,s1\n"
    config = DataConfig(
        text_column="review", label_column="stars", target_column="about", group_column="shop"
    )
    read = read_texts(write(tmp_path / "a.csv", content), config, name="train")
    assert read.examples == [TextExample("fine", "5", "tea", "s1", "a.csv:2")]


def test_json_objects_may_leave_out_columns(tmp_path):
    content = '{"text": "a"}\n{"text": "b", "label": "x", "group": "g"}\n'
    read = read_texts(
        write(tmp_path / "a.jsonl", content), DataConfig(group_column="group"), name="train"
    )
    assert [(e.text, e.group) for e in read.examples] == [("b", "g")]


@pytest.mark.parametrize(
    ("content", "changes", "message"),
    [
        (
            "review,label\na,x\n",
            {},
            r"column 'text' not found; columns are review, label\. Set data\.text_column\.",
        ),
        ("text,stars\na,x\n", {}, r"column 'label' not found.*Set data\.label_column"),
        (
            "text,label\na,x\n",
            {"target_column": "about"},
            r"column 'about' not found.*Set data\.target_column",
        ),
        (
            "text,label\na,x\n",
            {"group_column": "shop"},
            r"column 'shop' not found.*Set data\.group_column",
        ),
        ("text;label\na;x\n", {}, "column 'text' not found; columns are text;label"),
        ("text,label\n,x\na,\n", {}, r"found none among 2\. First: a\.csv:2: column 'text'"),
        ("", {}, "the file is empty"),
        ("\n\n", {}, "the file is empty"),
        ("text,label\n", {}, "expected rows below its header"),
        ("text,label\na,x\nb,x,y\n", {}, r"a\.csv:3: expected 2 cells .* found 3.*double quotes"),
        ('text,label\na,x\n"b"c,x\n', {}, r"a\.csv:3: not valid CSV"),
        ('text,label\na,x\n"b,x\nc,y\n', {}, r"a\.csv:3: not valid CSV: unexpected end of data"),
        ("text,label,text\na,x,b\n", {}, "column 'text' occurs more than once"),
        ("text,label\ncafé,x\n".encode("latin-1"), {}, r"a\.csv:2: not UTF-8 \(byte 4 .*UTF-8"),
        ("text,label\na,x\n".encode("utf-16"), {}, r"a\.csv:1: not UTF-8 \(byte 1 "),
        (b"text,label\na,x\xe4", {}, r"a\.csv:2: not UTF-8 \(byte 4 "),
    ],
)
def test_unusable_csv_files_get_one_clear_line(tmp_path, content, changes, message):
    source = write(tmp_path / "a.csv", content)
    with pytest.raises(UserError, match=message) as caught:
        read_texts(source, DataConfig(**changes), name="train")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a", "label": "x"}\n{"text": ', r"a\.jsonl:2: not valid JSON.*one object per"),
        ('[\n{"text": "a"}]', r"a\.jsonl:1: not valid JSON"),
        ('["a", "x"]\n', r"a\.jsonl:1: expected a JSON object per line, found a list"),
        ("[" * 100_000, r"a\.jsonl:1: not valid JSON"),
        ('{"label": ' + "1" * 5000 + "}", r"a\.jsonl:1: not valid JSON"),
        ("", "the file is empty: expected rows in it"),
        ("\n \n", "the file is empty"),
        ('{"text": "caf\xe9"}'.encode("latin-1"), r"a\.jsonl:1: not UTF-8 \(byte 14 "),
        ('{"text": ["a", "b"], "label": 1}', r"a\.jsonl:1: column 'text': expected text.*a list"),
        ('{"text": "a", "label": {"x": 1}}', r"a\.jsonl:1: column 'label': expected.*a dict"),
        ("{}", "column 'text' not found"),
    ],
)
def test_unusable_json_files_get_one_clear_line(tmp_path, content, message):
    source = write(tmp_path / "a.jsonl", content)
    with pytest.raises(UserError, match=message) as caught:
        read_texts(source, CONFIG, name="train")
    assert "\n" not in str(caught.value)


def test_unusable_parquet_files_get_one_clear_line(tmp_path):
    def message(source):
        with pytest.raises(UserError) as caught:
            read_texts(source, CONFIG, name="train")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    path = tmp_path / "a.parquet"
    for content in ("", "not parquet at all", b"PAR1" + bytes(100) + b"PAR1"):
        assert "not a valid Parquet file" in message(write(path, content))
    pq.write_table(pa.table({"text": ["a" * 50] * 9999, "label": list(range(9999))}), path)
    write(path, path.read_bytes()[:-40])
    assert "not a valid Parquet file" in message(str(path))
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), path)
    assert "the file is empty" in message(str(path))
    pq.write_table(pa.table([["a"], ["b"]], names=["text", "text"]), path)
    assert "column 'text' occurs more than once" in message(str(path))
    pq.write_table(pa.table({"text": [b"a"], "label": [1]}), path)
    assert "expected text or a number, found a bytes" in message(str(path))


def test_sources_that_are_no_file_of_a_known_kind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.txt", "x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder.csv").mkdir()
    for source in ("nothing.csv", "./nothing", "~/nothing-here", "/nothing/here", "NO.JSONL"):
        with pytest.raises(UserError, match="no such file"):
            iter_rows(source)  # at once, before the first row is asked for
    for source in (str(tmp_path), "folder", "folder.csv", ""):
        with pytest.raises(UserError, match=r"is a folder; expected a file: \.csv"):
            iter_rows(source)
    with pytest.raises(UserError, match=r"expected a file of \.csv.*found '\.txt'"):
        iter_rows("a.txt")
    with pytest.raises(UserError, match="no such file"):
        iter_rows("~no-such-user/a.csv")


# --- Hub -----------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """`datasets.load_dataset` that knows one data set; returns the calls."""
    import datasets

    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["bad", "good"]),
        }
    )
    known = datasets.Dataset.from_dict(
        {"text": ["a", "b", "c", None], "label": [1, 0, -1, None]}, features=features
    )
    calls = []

    def load(name, configuration, *, split, streaming):
        calls.append((name, configuration, split))
        assert not streaming
        if name == "empty":
            return known.select([])
        if name == "several/parts" and configuration not in ("small", "large"):
            raise ValueError("Config name is missing.")
        if name not in ("someone/reviews", "several/parts"):
            raise datasets.exceptions.DatasetNotFoundError(f"'{name}' doesn't exist.\nReally.")
        return known

    def configurations(name):
        if name == "several/parts":
            return ["small", "large"]
        raise datasets.exceptions.DatasetNotFoundError(name)

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets, "get_dataset_config_names", configurations)
    return calls


def test_hub_datasets_give_class_names(hub):
    read = read_texts("someone/reviews:test[:10%]", CONFIG, name="train")
    assert [(e.text, e.label) for e in read.examples] == [("a", "good"), ("b", "bad")]
    assert read.examples[1].name == "someone/reviews:test[:10%]:2"
    assert len(read.skipped) == 2  # -1 and null are no class
    read = read_texts("someone/reviews", CONFIG, name="train", split="validation")
    assert read.examples[0].name == "someone/reviews:validation:1"
    rows = iter_rows("someone/reviews", chunk=3)
    assert [row["label"] for row in rows] == ["good", "bad", None, None]
    read = read_texts("someone/reviews:large:test", CONFIG, name="train")
    assert read.examples[0].name == "someone/reviews:large:test:1"
    assert hub == [
        ("someone/reviews", None, "test[:10%]"),
        ("someone/reviews", None, "validation"),
        ("someone/reviews", None, "train"),
        ("someone/reviews", "large", "test"),
    ]


def test_hub_datasets_that_cannot_be_read(hub):
    with pytest.raises(UserError, match=r"no such file, and the Hub dataset 'x/y' .*exist\.$"):
        read_texts("x/y:test", CONFIG, name="train")
    with pytest.raises(
        UserError,
        match=r"Config name is missing\. It has the configurations small, large: name one as "
        r"several/parts:CONFIGURATION:SPLIT\.$",
    ):
        read_texts("several/parts:test", CONFIG, name="train")
    assert len(read_texts("several/parts:small:test", CONFIG, name="train")) == 2
    with pytest.raises(UserError, match="no rows in split 'train'"):
        read_texts("empty", CONFIG, name="train")
    with pytest.raises(UserError, match="column 'stars' not found; columns are text, label"):
        read_texts("someone/reviews", DataConfig(label_column="stars"), name="train")


# --- labels --------------------------------------------------------------------------------------


def test_label_names_are_sorted_by_value_if_they_are_integers():
    assert label_names(make_set([("a", "10"), ("b", "9"), ("c", "-1")])) == ["-1", "9", "10"]
    assert label_names(make_set([("a", "good"), ("b", "bad"), ("c", "10")])) == [
        "10",
        "bad",
        "good",
    ]
    with pytest.raises(UserError, match="at least two classes, found only 'x'"):
        label_names(make_set([("a", "x"), ("b", "x")]))


def test_labels_unseen_in_training_are_named():
    examples = make_set([("a", "x"), ("b", "z"), ("c", "y"), ("d", "z")], "validation")
    check_labels(examples, ["x", "y", "z"], where="v.csv")
    with pytest.raises(
        UserError, match=r"v\.csv: .*\(x, y\), found 'z'\. First: validation\.csv:3"
    ):
        check_labels(examples, ["x", "y"], where="v.csv")


# --- splits and leaks ----------------------------------------------------------------------------

examples_strategy = st.lists(
    st.builds(
        TextExample,
        st.sampled_from(["A", "a", "b", "c", "d", "e", "f", "g", "h"]),
        st.sampled_from(["x", "y", "z"]),
        st.sampled_from([None, "t", "u"]),
    ),
    min_size=1,
    max_size=60,
)


def check_split(examples, train, held):
    assert sorted(train + held) == list(range(len(examples)))
    assert train
    assert held
    assert {examples[i].label for i in train} == {example.label for example in examples}


@settings(max_examples=200)
@given(examples_strategy, st.floats(0.01, 0.9), st.integers(0, 3))
def test_held_out_texts_are_not_in_training_and_no_class_is_lost(examples, fraction, seed):
    try:
        train, held = hold_out_texts(examples, fraction, seed)
    except UserError:
        return
    check_split(examples, train, held)
    assert (train, held) == hold_out_texts(examples, fraction, seed)
    one, other = (
        TextSet(name, [examples[i] for i in indices])
        for name, indices in (("train", train), ("held", held))
    )
    assert text_leaks(one, other) == {}


@settings(max_examples=200)
@given(
    examples_strategy,
    st.lists(st.sampled_from([None, "1", "2", "3", "4", "5"]), min_size=60, max_size=60),
    st.integers(0, 3),
)
def test_held_out_texts_share_no_group_and_no_text(examples, groups, seed):
    examples = [
        TextExample(e.text, e.label, e.target, group)
        for e, group in zip(examples, groups, strict=False)
    ]
    if not any(example.group for example in examples):
        return
    try:
        train, held = hold_out_texts(examples, 0.2, seed)
    except UserError:
        return
    check_split(examples, train, held)

    def keys(indices):
        chosen = [examples[i] for i in indices]
        return {e.group for e in chosen if e.group}, {e.text.casefold() for e in chosen}

    for one, other in zip(keys(train), keys(held), strict=True):
        assert not one & other


@given(st.lists(st.integers(2, 80), min_size=2, max_size=6), st.sampled_from([0.1, 0.2, 0.5]))
def test_every_class_gives_its_share(sizes, fraction):
    labels = [str(label) for label, size in enumerate(sizes) for _ in range(size)]
    examples = [TextExample(f"text {i}", label) for i, label in enumerate(labels)]
    _, held = hold_out_texts(examples, fraction, 0)
    assert len(held) == max(1, round(fraction * len(examples)))
    given_ = Counter(labels[i] for i in held)
    for label, size in enumerate(sizes):
        # Rounding moves the common cut by little more than one example of a class.
        assert abs(given_[str(label)] - fraction * size) <= 2


def test_many_small_classes_still_give_the_share_together():
    examples = [TextExample(f"text {i}", str(i % 150)) for i in range(600)]
    train, held = hold_out_texts(examples, 0.1, 0)
    assert len(held) == 60
    assert max(Counter(examples[i].label for i in held).values()) == 1
    assert len({examples[i].label for i in train}) == 150


def test_the_seed_draws_the_split():
    examples = [TextExample(f"text {i}", str(i % 2)) for i in range(100)]
    assert hold_out_texts(examples, 0.1, 0) != hold_out_texts(examples, 0.1, 1)
    grouped = [TextExample(e.text, e.label, group=str(i // 5)) for i, e in enumerate(examples)]
    train, held = hold_out_texts(grouped, 0.1, 0)
    assert len(held) == 10
    assert len({grouped[i].group for i in held}) == 2
    assert (train, held) != hold_out_texts(grouped, 0.1, 1)


def test_repeated_texts_stay_together_and_a_large_block_stays_in_training():
    examples = [TextExample("Spam" if i % 2 else "spam", "x") for i in range(90)]
    examples += [TextExample(f"text {i}", "xy"[i % 2]) for i in range(10)]
    for seed in range(5):
        train, held = hold_out_texts(examples, 0.05, seed)
        assert set(range(90)) <= set(train)
        assert len(held) == 5


@pytest.mark.parametrize(
    "rows",
    [
        [("a", "x", None, "g"), ("b", "y", None, "g"), ("c", "x", None, "g")],  # one group
        [("a", "x", None, "g"), ("b", "y", None, "h")],  # each group is all of its class
        [("a", "x"), ("A", "x")],  # one text
        [("a", "x"), ("b", "y")],  # one text of each class
        [],
    ],
)
def test_what_belongs_together_cannot_be_held_out(rows):
    with pytest.raises(UserError, match=r"No validation data can be held out.*data\.validation"):
        hold_out_texts(make_set(rows).examples, 0.1, 0)


def test_leaks_are_texts_about_the_same_target_in_both_splits():
    train = make_set([("Good", "x", "tea"), ("bad", "y")])
    other = make_set([("good", "x", "Tea"), ("good", "x", "cup"), ("BAD", "x")], "validation")
    assert text_leaks(train, other) == {
        "same-text": [
            "validation.csv:2 = train.csv:2 (same label)",
            "validation.csv:4 = train.csv:3 (different label)",
        ]
    }
    assert text_leaks(train, make_set([("other", "x")])) == {}


def test_larger_leaks_are_refused_unless_allowed_by_name(caplog):
    train = make_set([(f"text {i}", "x") for i in range(50)])
    copied = make_set([(f"text {i}", "x") for i in range(48, 148)], "validation")
    with pytest.raises(
        UserError, match=r"2 of 100 texts of 'validation'.*same-text.*allow_leaks: \[same-text\]"
    ):
        refuse_text_leaks(train, copied, ["same-audio"])
    with caplog.at_level(logging.WARNING):
        assert len(refuse_text_leaks(train, copied, ["same-text"])["same-text"]) == 2
    assert "Accepted by data.allow_leaks" in caplog.text


def test_a_hundredth_of_leaked_texts_is_only_a_warning(caplog):
    train = make_set([("yes", "x")])
    rare = make_set([("yes", "x"), *((f"text {i}", "x") for i in range(99))], "validation")
    with caplog.at_level(logging.WARNING):
        assert refuse_text_leaks(train, rare, [])["same-text"]
    assert "validation.csv:2 = train.csv:2 (same label). Accepted: no more than 1 %." in caplog.text
    with pytest.raises(UserError):
        refuse_text_leaks(train, TextSet("validation", rare.examples[:99]), [])


@pytest.mark.skipif(not SHARED.exists(), reason="needs the shared data")
def test_real_sets_read_and_split():
    sst2 = [
        read_texts(str(SHARED / "sst2" / f"{name}.csv"), CONFIG, name=name)
        for name in ("train", "validation")
    ]
    assert [len(part) for part in sst2] == [6920, 872]
    assert label_names(sst2[0]) == ["negative", "positive"]
    refuse_text_leaks(sst2[0], sst2[1], [])
    news = read_texts(str(SHARED / "news_mtsc" / "train.csv"), CONFIG, name="train")
    train, held = hold_out_texts(news.examples, 0.1, 0)
    assert len(held) == pytest.approx(0.1 * len(news), rel=0.02)
    groups = [{news.examples[i].group for i in indices} for indices in (train, held)]
    assert not groups[0] & groups[1]
