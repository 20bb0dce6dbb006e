"""support/benchmarks.py: the nine evaluation sets, found by name, and their images, in folders, zips and the hub."""

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
    Image.new("RGB", size, colour(i)).save(buffer := BytesIO(), "PNG")
    return buffer.getvalue()


def row(question, answer, *images, **more):
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns, "images": list(images), **more}


def split_rows(name):
    """The shape of PAPO_eval: several images, none, unicode, sub-folders with one name in two of them."""
    top = f"{name}_images"
    return [
        row("<image>How many?", "1", f"{top}/a/1.png"),
        row(
            "<image>Und <image>, wie groß ist ∠ABC?", "90°", f"{top}/b/1.png", f"{top}/größe/图.png"
        ),
        row("What is 2 + 2?", "4"),
        row("<image>Which?", "B", f"{top}/2.png", id="own"),
    ]


def write_split(folder, name, rows=None, stem=None, top=None):
    """NAME.json and NAME_images.zip, as on the hub; `stem`: what both are called; `top`: the zip's first folder."""
    stem, top = stem or name, f"{name}_images" if top is None else top
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}.json").write_text(
        json.dumps(rows or split_rows(name), ensure_ascii=False), encoding="utf-8"
    )
    with zipfile.ZipFile(folder / f"{stem}_images.zip", "w") as archive:
        archive.mkdir(top) if hasattr(archive, "mkdir") else None
        for i, path in enumerate(("a/1.png", "b/1.png", "größe/图.png", "2.png")):
            archive.writestr(f"{top}/{path}", png(i))
        archive.writestr(f"{top}/cut.png", png(9, (300, 300))[:-400])
    return folder


def pictures(rows):
    return [[image.getpixel((0, 0)) for image in rows[i].images] for i in range(len(rows))]


EXPECTED = [[colour(0)], [colour(1), colour(2)], [], [colour(3)]]


# ------------------------------------------------------------------------------------------------- the nine splits


def test_splits_by_name(tmp_path):
    stems = {name: alias for alias, name in benchmarks.ALIASES.items()}
    for name in benchmarks.BENCHMARKS["all"]:
        write_split(tmp_path, name, stem=stems.get(name))
    for spec in ("all", "general", "vision_dependent", "We_Math", "We-Math_We-Math"):
        sets = benchmarks.eval_sets(spec, place=str(tmp_path))
        names = {"We-Math_We-Math": ("We_Math",), "We_Math": ("We_Math",)}.get(
            spec
        ) or benchmarks.BENCHMARKS[spec]
        assert tuple(sets) == names
        assert all(pictures(rows) == EXPECTED for rows in sets.values())
    rows = sets["We_Math"]
    assert [rows[i].id for i in range(4)] == ["0", "1", "2", "own"]
    assert rows[1].question == "<image>Und <image>, wie groß ist ∠ABC?" and rows[1].answer == "90°"
    assert (
        tuple(benchmarks.eval_sets(str(tmp_path))) == benchmarks.BENCHMARKS["all"]
    )  # a folder that holds some
    assert {len(benchmarks.BENCHMARKS[spec]) for spec in ("general", "vision_dependent")} == {5, 4}


@pytest.mark.parametrize("layout", ["papo-eval", "beside", "other top folder", "no top folder"])
def test_where_pictures_lie(tmp_path, layout):
    name = "We_Math"
    rows = split_rows(name)
    if (
        layout == "papo-eval"
    ):  # papo/NAME.json, images/NAME_images/..., as its preparation leaves them
        write_split(tmp_path, name, rows)
        zipfile.ZipFile(tmp_path / f"{name}_images.zip").extractall(tmp_path / "images")
        (tmp_path / f"{name}_images.zip").unlink()
        (tmp_path / "papo").mkdir()
        (tmp_path / f"{name}.json").rename(tmp_path / "papo" / f"{name}.json")
    elif layout == "beside":
        write_split(
            tmp_path, name, [r | {"images": [f"images/{p}" for p in r["images"]]} for r in rows]
        )
    else:
        write_split(
            tmp_path,
            name,
            rows,
            top="We-Math_We-Math_images" if layout == "other top folder" else "./",
        )
    assert pictures(benchmarks.eval_sets(name, place=str(tmp_path))[name]) == EXPECTED


def test_a_picture_is_never_guessed(tmp_path):
    """Two pictures of one name in two folders: a path that is in neither is broken, not one of them."""
    rows = [
        row("<image>?", "1", "We_Math_images/c/1.png"),
        row("<image>?", "1", "1.png"),
        row("2 + 2?", "4"),
    ]
    write_split(tmp_path, "We_Math", rows)
    found = benchmarks.eval_sets("We_Math", place=str(tmp_path))["We_Math"]
    assert list(found.numbers) == [2] and found.skipped == {"broken image": 2}


def test_a_zip_is_read_in_place(tmp_path):
    rows = [row("<image>?", "1", "../outside.png"), row("<image>?", "1", "We_Math_images/2.png")]
    folder = write_split(tmp_path / "in", "We_Math", rows)
    with zipfile.ZipFile(folder / "We_Math_images.zip", "a") as archive:
        archive.writestr("../outside.png", png(5))
        archive.writestr("/outside.png", png(5))
    before = sorted(tmp_path.rglob("*"))
    assert len(benchmarks.eval_sets("We_Math", place=str(folder))["We_Math"]) >= 1
    assert sorted(tmp_path.rglob("*")) == before


def test_from_the_hub_cache(tmp_path, monkeypatch):
    """What hf's client has fetched is used without a network; a split that it has not is one line."""
    repo = tmp_path / "datasets--PAPO-Galaxy--PAPO_eval"
    write_split(repo / "snapshots" / "abc" / "sub", "We_Math", stem="We-Math_We-Math")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert pictures(benchmarks.eval_sets("We_Math")["We_Math"]) == EXPECTED
    with pytest.raises(
        data.DataError, match="no benchmark hiyouga_geometry3k in PAPO-Galaxy/PAPO_eval"
    ):
        benchmarks.eval_sets("general")
    with pytest.raises(
        data.DataError,
        match="^benchmarks 'no/such' is no folder here, and cannot be had from the hub",
    ):
        benchmarks.eval_sets("We_Math", place="no/such")


@pytest.mark.parametrize("broken", ["table", "zip"])
def test_broken_benchmark_files(tmp_path, broken):
    folder = write_split(tmp_path, "We_Math")
    (folder / {"table": "We_Math.json", "zip": "We_Math_images.zip"}[broken]).write_bytes(
        b"[PK\x03\x04 nothing"
    )
    with pytest.raises(
        data.DataError, match=f"^benchmark We_Math in {tmp_path} cannot be read: "
    ) as error:
        benchmarks.eval_sets("We_Math", place=str(folder))
    assert "\n" not in str(error.value)
