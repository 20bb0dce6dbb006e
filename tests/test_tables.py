"""support/tables.py: files, folders, the hub, and the nine benchmarks with their images in zips."""

import json
import os
import zipfile
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
from conftest import answers, image_bytes, write_jsonl, write_parquet
from huggingface_hub import constants
from PIL import Image

from support import data, tables


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def colour(i):
    return (40 * i % 256, 255 - 20 * i, 90)


def png(i, size=(60, 40)):
    return image_bytes(Image.new("RGB", size, colour(i)))


def row(question, answer, *images, **more):
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns, "images": list(images), **more}


def split_rows(name):
    """The shape of PAPO_eval: several images, none, Unicode, one file name in two folders."""
    top = f"{name}_images"
    two_images = [f"{top}/b/1.png", f"{top}/größe/图.png"]
    return [
        row("<image>How many?", "1", f"{top}/a/1.png"),
        row("<image>Und <image>, wie groß ist ∠ABC?", "90°", *two_images),
        row("What is 2 + 2?", "4"),
        row("<image>Which?", "B", f"{top}/2.png", id="own"),
    ]


EXPECTED = [[colour(0)], [colour(1), colour(2)], [], [colour(3)]]


def colours(rows):
    """The colour of each row's images."""
    return [[image.getpixel((0, 0)) for image in example.images] for example in rows]


def write_split(folder, name, rows=None, stem=None, top=None):
    """NAME.json and NAME_images.zip, as on the hub.

    stem: what both files are called instead of `name`. top: the zip's first folder, with its slash.
    """
    stem = stem or name
    top = f"{name}_images/" if top is None else top
    folder.mkdir(parents=True, exist_ok=True)
    table = json.dumps(rows or split_rows(name), ensure_ascii=False)
    (folder / f"{stem}.json").write_text(table, encoding="utf-8")
    with zipfile.ZipFile(folder / f"{stem}_images.zip", "w") as archive:
        for i, path in enumerate(("a/1.png", "b/1.png", "größe/图.png", "2.png")):
            archive.writestr(f"{top}{path}", png(i))
        archive.writestr(f"{top}cut.png", png(9, (300, 300))[:-400])
    return folder


def question(i, **more) -> dict:
    return {"problem": f"n{i}", "answer": str(i), **more}


def answers_of(sets) -> dict[str, list[str]]:
    return {name: answers(rows) for name, rows in sets.items()}


# ------------------------------------------------------------------------------- files and folders


def write_hub_parquet(path: Path, numbers) -> None:
    """As push_to_hub writes it, with a type that this version of datasets does not know."""
    images = [[{"bytes": png(i, (30 + i, 30)), "path": "x.png"}] for i in numbers]
    rows = [question(i, images=image) for i, image in zip(numbers, images, strict=True)]
    features = {"info": {"features": {"images": {"_type": "Unheard"}}}}
    table = pyarrow.parquet.read_table(write_parquet(path, rows))
    table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    pyarrow.parquet.write_table(table, path)


def test_the_hubs_layout(tmp_path, monkeypatch):
    """In a folder, or as the hub's client downloads it."""
    folder = tmp_path / "set[1]"  # not a pattern
    write_hub_parquet(folder / "data/train-00000-of-00002.parquet", range(3))
    write_hub_parquet(folder / "data/train-00001-of-00002.parquet", range(3, 6))
    write_hub_parquet(folder / "data/test-00000-of-00001.parquet", [7])
    (folder / "dataset_infos.json").write_text("{}")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(folder))
    for spec, name in ((str(folder), "set[1]"), ("o/plain", "plain")):
        rows = data.load(spec)
        assert answers(rows) == list("012345")
        assert colours(rows) == [[colour(i)] for i in range(6)]
        assert answers_of(data.eval_sets(spec)) == {name: ["7"]}
    for file in folder.glob("data/train*"):
        file.unlink()
    with pytest.raises(ValueError, match="no split 'train', it has test"):
        data.load(str(folder))


def test_parts_whose_types_differ(tmp_path):
    """No row; nulls, then images; text, integers or floats as answers; lists or single images."""
    image = {"bytes": png(1), "path": "a.png"}
    (tmp_path / "b.png").write_bytes(png(2))
    empty = write_parquet(tmp_path / "train-0.parquet", [question(0)])
    pyarrow.parquet.write_table(pyarrow.parquet.read_table(empty).slice(0, 0), empty)
    write_parquet(tmp_path / "train-1.parquet", [question(1, images=None)])
    write_parquet(tmp_path / "train-2.parquet", [question(2, images=[image])])
    write_parquet(tmp_path / "train-3.parquet", [{"problem": "c", "answer": 3, "images": image}])
    rows = [{"problem": "d", "answer": 4.0, "images": "b.png"}, {"problem": "e", "answer": None}]
    write_parquet(tmp_path / "train-4.parquet", rows)
    rows = data.load(str(tmp_path))
    assert answers(rows) == ["1", "2", "3", "4"]
    assert colours(rows) == [[], [colour(1)], [colour(1)], [colour(2)]]
    assert rows.unusable == {"no text in answer": 1}


def test_a_rewritten_parquet_file_is_read_again(tmp_path):
    """Though datasets keeps a copy, and the new file may look older."""
    for number in (1, 2):
        file = write_parquet(tmp_path / "rows.parquet", [question(number)])
        os.utime(file, (number % 2 * 9, number % 2 * 9))
        assert answers(data.load(str(file))) == [str(number)]


def test_json_and_jsonl_files(tmp_path):
    rows = [{"problem": "a\u2028b", "answer": 1}, {"problem": "c", "answer": "two"}]
    lines = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    contents = {
        "list.json": json.dumps(rows, ensure_ascii=False, indent=1),
        "lines.json": "\ufeff" + lines + "\n\n",
        "lines.jsonl": lines + '\n{"problem": "cut',
    }
    for name, content in contents.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
        loaded = data.load(str(tmp_path / name))
        assert [example.question for example in loaded] == ["a\u2028b", "c"]
        assert answers(loaded) == ["1", "two"]
        assert loaded.unusable == ({"not a row": 1} if name == "lines.jsonl" else {})


def test_folders_of_json_files(tmp_path):
    write_jsonl(tmp_path / "b.jsonl", [question(1), question(2)])
    write_jsonl(tmp_path / "a.json", [question(0)])
    assert answers(data.load(str(tmp_path))) == ["0", "1", "2"]
    assert answers_of(data.eval_sets(str(tmp_path), limit=1)) == {"a": ["0"], "b": ["1"]}
    write_jsonl(tmp_path / "test.json", [question(7)])
    assert answers_of(data.eval_sets(str(tmp_path))) == {tmp_path.name: ["7"]}


def test_folders_of_images_with_their_metadata(tmp_path):
    """imagefolder's layouts: all in one folder, or a folder per split."""
    for split, numbers in (("train", (0, 1)), ("test", (2,))):
        rows = [question(i, file_name=f"{i}.png", level=i) for i in numbers]
        write_jsonl(tmp_path / split / "metadata.jsonl", rows)
        for i in numbers:
            (tmp_path / split / f"{i}.png").write_bytes(png(i))
    for folder in (tmp_path, tmp_path / "train"):
        rows = data.load(str(folder))
        assert colours(rows) == [[colour(0)], [colour(1)]]
        assert rows[1].columns == {"level": 1}
    assert answers_of(data.eval_sets(str(tmp_path))) == {tmp_path.name: ["2"]}


def test_unusable_files_give_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("table.csv").write_text("problem,answer\n")
    Path("empty").mkdir()
    whole = write_parquet(Path("parts/a.parquet"), [question(0)]).read_bytes()
    Path("parts/b.parquet").write_bytes(whole[:-20])
    Path("pointer.jsonl").write_text("version https://git-lfs.github.com/spec/v1\nsize 9\n")
    write_split(Path("zip"), "We_Math")
    Path("zip/We_Math_images.zip").write_bytes(b"PK\x03\x04 nothing")
    for name, words in [
        ("nowhere.jsonl", "'nowhere.jsonl' is none of toy, a file of .json"),
        ("pointer.jsonl", "pointer.jsonl cannot be read: ValueError: a Git LFS pointer"),
        ("table.csv", "unknown extension: choose one of .json"),
        ("empty", "no file of .json, .jsonl, .parquet in empty"),
        ("parts", "parts/b.parquet cannot be read: ArrowInvalid: Parquet magic bytes"),
        ("zip", "zip/We_Math_images.zip cannot be read: File is not a zip"),
    ]:
        with pytest.raises(ValueError, match=words):
            data.eval_sets(name)


# ----------------------------------------------------------------------------------- the benchmarks


def test_sets_by_name(tmp_path):
    stems = {name: alias for alias, name in tables.ALIASES.items()}
    for name in tables.BENCHMARKS["all"]:
        write_split(tmp_path, name, stem=stems.get(name))
    one = ("We_Math",)
    meant = tables.BENCHMARKS | {"We_Math": one, "We-Math_We-Math": one}
    for spec, names in meant.items():
        sets = data.eval_sets(spec, source=str(tmp_path))
        assert tuple(sets) == names
        assert all(colours(rows) == EXPECTED for rows in sets.values())
    rows = sets["We_Math"]
    assert [example.id for example in rows] == ["0", "1", "2", "own"]
    assert rows[1].question == "<image>Und <image>, wie groß ist ∠ABC?"
    assert rows[1].answer == "90°"
    assert tuple(data.eval_sets(str(tmp_path))) == tables.BENCHMARKS["all"]
    assert (len(tables.GENERAL), len(tables.VISION)) == (5, 4)


def test_where_images_lie(tmp_path):
    """Under other folders in a zip; unpacked, as PAPO-Eval does; and nothing is ever unpacked."""

    def read(folder):
        return colours(data.eval_sets("We_Math", source=str(folder))["We_Math"])

    for top in ("We-Math_We-Math_images/", "", "./"):
        folder = write_split(tmp_path / "in", "We_Math", top=top)
        before = sorted(tmp_path.rglob("*"))
        assert read(folder) == EXPECTED
        assert sorted(tmp_path.rglob("*")) == before
    unpacked = write_split(tmp_path / "unpacked", "We_Math")
    archive = unpacked / "We_Math_images.zip"
    zipfile.ZipFile(archive).extractall(unpacked / "images")
    archive.unlink()
    (unpacked / "papo").mkdir()
    (unpacked / "We_Math.json").rename(unpacked / "papo" / "We_Math.json")
    assert read(unpacked) == EXPECTED


def test_an_image_is_never_guessed(tmp_path):
    """A path that is nowhere is a broken image, not another image of that name or the only one."""
    paths = ["We_Math_images/c/1.png", "1.png", "3.png"]
    rows = [row("<image>?", "1", path) for path in paths]
    write_split(tmp_path, "We_Math", [*rows, row("2 + 2?", "4")])
    with zipfile.ZipFile(tmp_path / "We_Math_images.zip", "a") as archive:
        archive.writestr("only.png", png(5))
    found = data.eval_sets("We_Math", source=str(tmp_path))["We_Math"]
    assert found.numbers == [3]
    assert found.unusable == {"broken image": 3}


def test_from_the_hub_cache(tmp_path, monkeypatch):
    """What the hub's client has downloaded is used offline; a missing set gives one line."""
    repo = tmp_path / "datasets--PAPO-Galaxy--PAPO_eval"
    write_split(repo / "snapshots" / "abc" / "sub", "We_Math", stem="We-Math_We-Math")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert colours(data.eval_sets("We_Math")["We_Math"]) == EXPECTED
    with pytest.raises(ValueError, match="no benchmark hiyouga_geometry3k in .*PAPO_eval"):
        data.eval_sets("general")
    with pytest.raises(ValueError, match="'o/plain' is none of .*disabled"):
        data.load("o/plain")
