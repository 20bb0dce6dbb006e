"""support/benchmarks.py: the nine evaluation sets by name, and their images in folders and zips."""

import json
import zipfile
from io import BytesIO

import pytest
from huggingface_hub import constants
from PIL import Image

from support import benchmarks, data


def colour(i):
    return (40 * i % 256, 255 - 20 * i, 90)


def png(i, size=(60, 40)):
    buffer = BytesIO()
    Image.new("RGB", size, colour(i)).save(buffer, "PNG")
    return buffer.getvalue()


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
        if top:
            archive.writestr(top, b"")  # the folder's own entry
        for i, path in enumerate(("a/1.png", "b/1.png", "größe/图.png", "2.png")):
            archive.writestr(f"{top}{path}", png(i))
        archive.writestr(f"{top}cut.png", png(9, (300, 300))[:-400])
    return folder


def test_sets_by_name(tmp_path):
    stems = {name: alias for alias, name in benchmarks.ALIASES.items()}
    for name in benchmarks.BENCHMARKS["all"]:
        write_split(tmp_path, name, stem=stems.get(name))
    one = ("We_Math",)
    meant = benchmarks.BENCHMARKS | {"We_Math": one, "We-Math_We-Math": one}
    for spec, names in meant.items():
        sets = benchmarks.eval_sets(spec, source=str(tmp_path))
        assert tuple(sets) == names
        assert all(colours(rows) == EXPECTED for rows in sets.values())
    rows = sets["We_Math"]
    assert [example.id for example in rows] == ["0", "1", "2", "own"]
    assert rows[1].question == "<image>Und <image>, wie groß ist ∠ABC?"
    assert rows[1].answer == "90°"
    in_folder = benchmarks.eval_sets(str(tmp_path))
    assert tuple(in_folder) == benchmarks.BENCHMARKS["all"]
    assert (len(benchmarks.GENERAL), len(benchmarks.VISION)) == (5, 4)


@pytest.mark.parametrize("top", [None, "We-Math_We-Math_images/", "", "./"])
def test_where_images_lie_in_a_zip(tmp_path, top):
    write_split(tmp_path, "We_Math", top=top)
    assert colours(benchmarks.eval_sets("We_Math", source=str(tmp_path))["We_Math"]) == EXPECTED


def test_images_unpacked_as_papo_eval_does(tmp_path):
    """papo/NAME.json and images/NAME_images/..., or paths with images/ in front and a zip."""
    rows = split_rows("We_Math")
    for one in rows:
        one["images"] = [f"images/{path}" for path in one["images"]]
    zipped = write_split(tmp_path / "zipped", "We_Math", rows)
    unpacked = write_split(tmp_path / "unpacked", "We_Math")
    archive = unpacked / "We_Math_images.zip"
    zipfile.ZipFile(archive).extractall(unpacked / "images")
    archive.unlink()
    (unpacked / "papo").mkdir()
    (unpacked / "We_Math.json").rename(unpacked / "papo" / "We_Math.json")
    for folder in (zipped, unpacked):
        assert colours(benchmarks.eval_sets("We_Math", source=str(folder))["We_Math"]) == EXPECTED


def test_an_image_is_never_guessed(tmp_path):
    """A path that is nowhere is a broken image, not another image of that name or the only one."""
    paths = ["We_Math_images/c/1.png", "1.png", "3.png"]
    rows = [row("<image>?", "1", path) for path in paths]
    write_split(tmp_path, "We_Math", [*rows, row("2 + 2?", "4")])
    with zipfile.ZipFile(tmp_path / "We_Math_images.zip", "a") as archive:
        archive.writestr("only.png", png(5))
    found = benchmarks.eval_sets("We_Math", source=str(tmp_path))["We_Math"]
    assert found.numbers == [3]
    assert found.skipped == {"broken image": 3}


def test_a_zip_is_read_in_place(tmp_path):
    rows = [row("<image>?", "1", "../outside.png"), row("<image>?", "1", "We_Math_images/2.png")]
    folder = write_split(tmp_path / "in", "We_Math", rows)
    with zipfile.ZipFile(folder / "We_Math_images.zip", "a") as archive:
        archive.writestr("../outside.png", png(5))
        archive.writestr("/outside.png", png(5))
    before = sorted(tmp_path.rglob("*"))
    assert len(benchmarks.eval_sets("We_Math", source=str(folder))["We_Math"]) >= 1
    assert sorted(tmp_path.rglob("*")) == before


def test_from_the_hub_cache(tmp_path, monkeypatch):
    """What the hub's client has downloaded is used offline; a missing set gives one line."""
    repo = tmp_path / "datasets--PAPO-Galaxy--PAPO_eval"
    write_split(repo / "snapshots" / "abc" / "sub", "We_Math", stem="We-Math_We-Math")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert colours(benchmarks.eval_sets("We_Math")["We_Math"]) == EXPECTED
    missing = "no benchmark hiyouga_geometry3k in PAPO-Galaxy/PAPO_eval"
    with pytest.raises(data.DataError, match=missing):
        benchmarks.eval_sets("general")
    unknown = "^benchmarks 'no/such' is not a folder here, and cannot be loaded from the hub"
    with pytest.raises(data.DataError, match=unknown):
        benchmarks.eval_sets("We_Math", source="no/such")


@pytest.mark.parametrize("broken", ["We_Math.json", "We_Math_images.zip"])
def test_broken_files_give_one_line(tmp_path, broken):
    folder = write_split(tmp_path, "We_Math")
    (folder / broken).write_bytes(b"[PK\x03\x04 nothing")
    message = f"^benchmark We_Math in {tmp_path} cannot be read: "
    with pytest.raises(data.DataError, match=message) as error:
        benchmarks.eval_sets("We_Math", source=str(folder))
    assert "\n" not in str(error.value)
