"""support/data.py: the forms of rows and images, the ways they can be broken, and the stream."""

import io
import json
import os
import subprocess
import sys
import textwrap
import threading
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from huggingface_hub import constants
from PIL import Image

from support import StepError, benchmarks, data

ROOT = Path(__file__).resolve().parent.parent
RED, BLUE = (250, 0, 0), (0, 0, 250)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.delenv("RANK", raising=False)


def to_bytes(image: Image.Image, form="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def plain(size=(40, 30), color=RED) -> bytes:
    return to_bytes(Image.new("RGB", size, color))


def noise(size=(200, 200), form="PNG") -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    return to_bytes(Image.fromarray(pixels), form)


def truncated(image: bytes) -> bytes:
    """The header is complete and the pixels are not."""
    return image[: len(image) // 2]


def row(image=None, **changes) -> dict:
    images = [plain() if image is None else image]
    return {"problem": "<image>How many?", "answer": "3", "images": images} | changes


def text(i) -> dict:
    return {"problem": f"What is {i} + 0?", "answer": str(i)}


def usable(table, folder=Path("."), **options) -> data.Rows:
    return data.usable_rows("mine", table, folder, **options)


def the_image(stored: bytes) -> Image.Image:
    [image] = usable([row(stored)])[0].images
    return image


def is_red(image: Image.Image) -> bool:
    middle = image.getpixel((image.width // 2, image.height // 2))
    return image.mode == "RGB" and max(abs(a - b) for a, b in zip(middle, RED, strict=True)) < 10


def answers(rows) -> list[str]:
    return [example.answer for example in rows]


def write_jsonl(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ------------------------------------------------------------------------ forms of rows and images


def test_image_forms(tmp_path):
    (tmp_path / "images").mkdir()
    file = tmp_path / "images" / "a.png"
    file.write_bytes(plain())
    name = "images/a.png"
    forms = [
        [plain()],
        [{"bytes": plain(), "path": "elsewhere.png"}],
        [{"bytes": None, "path": name}],
        [name],
        [str(file)],
        [Image.new("RGB", (40, 30), RED)],
        name,
        {"path": name},
    ]
    rows = usable([row(images=images) for images in forms], tmp_path)
    assert len(rows) == len(forms)
    for example in rows:
        [image] = example.images
        assert image.size == (40, 30)
        assert is_red(image)


@pytest.mark.parametrize(
    ("mode", "color", "form"),
    [
        ("CMYK", (0, 255, 255, 0), "JPEG"),
        ("RGBA", (*RED, 255), "PNG"),
        ("RGBA", (*RED, 0), "PNG"),  # invisible, and still red: as the released code has it
        ("RGBA", (*RED, 0), "WEBP"),
        ("P", 1, "PNG"),
        ("P", 1, "GIF"),
    ],
)
def test_image_modes_become_rgb(mode, color, form):
    image, options = Image.new(mode, (40, 30), color), {}
    if mode == "P":
        image.putpalette([0, 0, 0, *RED, *BLUE])
        options = {"transparency": 1}
    if form == "WEBP":
        options = {"lossless": True, "exact": True}
    stored = to_bytes(image, form, **options)
    assert mode == "RGBA" or Image.open(io.BytesIO(stored)).mode == mode
    assert is_red(the_image(stored))


def test_grey_bilevel_and_16_bit_images():
    def value(image):
        result = the_image(to_bytes(image))
        assert result.mode == "RGB"
        return result.getpixel((0, 0))

    assert value(Image.new("L", (40, 30), 77)) == (77,) * 3
    assert value(Image.new("LA", (40, 30), (77, 0))) == (77,) * 3
    assert value(Image.new("1", (40, 30), 1)) == (255,) * 3
    for deep, shallow in ((0, 0), (77 * 256, 77), (65535, 255)):
        assert value(Image.fromarray(np.full((30, 40), deep, dtype=np.uint16))) == (shallow,) * 3


@pytest.mark.parametrize("form", ["PNG", "WEBP", "JPEG"])
def test_exif_orientation_is_applied_and_broken_exif_ignored(form):
    image = Image.new("RGB", (40, 30), RED)
    image.paste(BLUE, (0, 0, 20, 30))  # the left half
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise: blue on top
    upright = the_image(to_bytes(image, form, exif=exif))
    assert upright.size == (30, 40)
    assert upright.getpixel((15, 5))[2] > 200
    assert upright.getpixel((15, 35))[0] > 200
    assert the_image(to_bytes(image, form, exif=b"Exif\0\0rubbish")).size == (40, 30)


def test_several_images_text_only_rows_and_pre_masked_images():
    red, blue = plain(), plain(color=BLUE)
    two = {"problem": "<image>or<image>?", "answer": "a"}
    table = [
        two | {"images": [red, blue], "images_aug": [blue, red]},
        text(1),
        text(2) | {"images": None},
        text(3) | {"images": [], "images_aug": []},
        text(4) | {"images": [None]},
    ]
    first, *text_only = usable(table)
    assert [is_red(image) for image in first.images] == [True, False]
    assert [is_red(image) for image in first.more_images["images_aug"]] == [False, True]
    assert len(text_only) == 4
    assert all(example.images == [] and example.more_images == {} for example in text_only)


def test_answers_become_text_and_ids_are_kept():
    stored = ["x", 3, 3.0, 2.5, True, 0, -1, False]
    rows = usable([{"problem": "?", "answer": answer} for answer in stored])
    assert answers(rows) == ["x", "3", "3", "2.5", "True", "0", "-1", "False"]
    rows = usable([text(0), text(0) | {"id": 17}, text(0) | {"id": "geo_1"}])
    assert [example.id for example in rows] == ["0", "17", "geo_1"]


def test_question_column_and_sharegpt_rows():
    user = {"role": "user", "content": "<image>How many?"}
    assistant = {"role": "assistant", "content": "3"}
    shared = {"images": [plain()], "id": "s1"}
    [example] = usable([shared | {"messages": [user, assistant]}])
    assert (example.question, example.answer, example.id) == ("<image>How many?", "3", "s1")
    assert is_red(example.images[0])
    assert usable([{"question": "Why?", "answer": "so"}])[0].question == "Why?"
    system = {"role": "system", "content": "x"}
    wrong = [
        [user],
        [user, assistant] * 2,
        [assistant, user],
        [system, user, assistant],
        [],
        "text",
    ]
    with pytest.raises(data.DataError, match=r"none of its 6 rows can be used \(messages 6\)"):
        usable([shared | {"messages": turns} for turns in wrong])


# ------------------------------------------------------------------------------------- broken rows

BROKEN = {
    "not a row": 7,
    "not JSON": '{"problem": "cut o',
    "missing column": {"problem": "?", "text": "?"},
    "empty question": {"problem": " ", "answer": "1"},
    "empty answer": {"problem": "?", "answer": None},
    "answer is not text": {"problem": "?", "answer": ["1"]},
    "question is not text": {"problem": {"text": "?"}, "answer": "1"},
    "answer is not valid Unicode": {"problem": "?", "answer": "3 \ud83d"},
    "markers": row(problem="<image><image>?"),
    "images_aug": row(images_aug=[plain()] * 2),
    "broken image": row(b"rubbish"),
    "aspect ratio": row(plain((4020, 20))),
    "messages": {"messages": [{"role": "user", "content": "?"}]},
}


def test_broken_rows_are_skipped_and_the_first_of_each_kind_is_reported(capsys, monkeypatch):
    table = [*BROKEN.values(), text(0), *BROKEN.values(), text(1)]
    rows = usable(table)
    assert rows.skipped == Counter({kind: 2 for kind in BROKEN})
    assert rows.numbers == [len(BROKEN), len(table) - 1]
    assert answers(rows) == ["0", "1"]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(BROKEN)
    for number, (kind, line) in enumerate(zip(BROKEN, lines, strict=True)):
        assert line.startswith(f"mine: row {number} is skipped, {kind}: ")
        assert len(line) < 320
    monkeypatch.setenv("RANK", "1")  # only the first rank reports
    assert usable(table).skipped == rows.skipped
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (row(b""), "0 bytes"),
        (row({"bytes": None, "path": None}), "None"),
        (row(3), "3"),
        (row("nowhere.png"), "nowhere.png"),
        (row("."), "."),
        (row("a\0b.png"), "a\0b.png"),
        (row(plain()[:20]), "20 bytes"),
        (row(problem="no marker"), "0 <image> markers for 1 images: no marker"),
        ({"problem": "?", "answer": float("nan")}, "nan"),
        ({"problem": "?"}, "answer; the row has problem"),
        (row(plain((4020, 20))), "4020 x 20"),
    ],
)
def test_the_report_names_the_value(value, words, capsys):
    assert len(usable([value, text(1)])) == 1
    assert words in capsys.readouterr().err


def test_a_decompression_bomb_is_a_broken_image(capsys, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40 * 30 // 2 - 1)  # PIL refuses twice as many
    usable([row(), text(0)])
    assert "decompression bomb" in capsys.readouterr().err


def test_a_set_without_usable_rows():
    with pytest.raises(data.DataError) as caught:
        usable([BROKEN["markers"], BROKEN["empty answer"], BROKEN["markers"]])
    expected = (
        "data 'mine': none of its 3 rows can be used (markers 2, empty answer 1): mine: row 0"
    )
    assert str(caught.value).startswith(expected)
    with pytest.raises(data.DataError, match=r"none of its 0 rows can be used: no rows"):
        usable([])


PAIRS = {"images_pos": "image_noisy", "images_neg": "image_aug"}  # ours, and as released


def test_further_image_columns_under_both_names(capsys):
    """A column that is asked for must be there, for rows with images; others are not read."""
    red, blue = plain(), plain(color=BLUE)
    ours = row(red, images_pos=[red], images_neg=[blue])
    released = row(red, image_noisy=red, image_aug=blue)  # one image, not a list
    table = [ours, released, text(1), row(red, images_pos=[red]), row(red, image_aug=[blue, blue])]
    rows = data.usable_rows("mine", table, Path(), columns=tuple(PAIRS))
    assert rows.numbers == [0, 1, 2]
    assert rows.skipped == Counter({"missing column": 2})
    error = capsys.readouterr().err
    assert "row 3 is skipped, missing column: images_neg or image_aug; the row has" in error
    for example in (rows[0], rows[1]):
        found = {name: is_red(images[0]) for name, images in example.more_images.items()}
        assert found == {"images_pos": True, "images_neg": False}
    assert rows[2].more_images == {}
    assert all(usable(table)[i].more_images == {} for i in range(5))
    with pytest.raises(data.BadRowError, match="2 images in images_neg for 1 images"):
        data.parse_row(table[4], 0, ("images_neg",))


def test_a_set_without_a_column_is_one_line(capsys, tmp_path):
    with pytest.raises(data.DataError) as caught:
        data.usable_rows("mine", [row(), row()], Path(), columns=("images_pos",))
    message = str(caught.value)
    assert "none of its 2 rows can be used (missing column 2)" in message
    assert "images_pos or image_noisy; the row has problem, answer, images" in message
    assert capsys.readouterr().err == ""
    with pytest.raises(
        data.DataError, match="toy has no image column 'depth': choose from images_"
    ):
        data.load("toy", columns=("depth",))
    rows = data.load("toy", columns=("images_neg",))
    assert [*rows[5].more_images] == ["images_neg"]


def test_pixels_that_turn_out_broken(tmp_path):
    """Headers are all that is read before a row is asked for."""
    (tmp_path / "a.png").write_bytes(plain())
    images = [truncated(noise()), truncated(noise(form="JPEG")), "a.png", noise()]
    rows = usable([row(image) for image in images], tmp_path)
    assert len(rows) == 4
    (tmp_path / "a.png").unlink()
    for i in range(3):
        with pytest.raises(data.BadRowError, match="broken image") as caught:
            rows[i]
        assert caught.value.kind == "broken image"
    assert rows[3].images[0].size == (200, 200)


def test_overlong_prompts_are_found_from_headers(capsys):
    measured = []

    def length(question, sizes):
        measured.append((question, sizes))
        if "spells" in question:
            raise ValueError("the question spells out an image token")
        return len(question) + sum(width * height // 784 for width, height in sizes)

    half = truncated(noise((600, 400)))
    big = row(half, problem="<image>big?", images_aug=[half])
    small = row(plain((28, 28)), problem="<image>small?")
    table = [big, small, text(0), text(1) | {"problem": "spells"}]
    rows = usable(table, length=length, max_prompt_tokens=100)
    assert rows.skipped == {"overlong": 1, "refused": 1}
    assert rows.numbers == [1, 2]
    assert measured[:2] == [("<image>big?", [(600, 400)]), ("<image>small?", [(28, 28)])]
    assert measured[2] == ("What is 0 + 0?", [])
    assert "row 0 is skipped, overlong: 317 prompt tokens, more than 100" in capsys.readouterr().err
    assert len(usable([big, small], length=length)) == 2


def test_limit_takes_the_first_usable_rows():
    table = [BROKEN["markers"], text(1), BROKEN["markers"], text(3), text(4)]
    rows = usable(table, limit=2)
    assert rows.numbers == [1, 3]
    assert rows.skipped == {"markers": 2}
    assert usable(table, limit=100).numbers == usable(table, limit=0).numbers == [1, 3, 4]


# ------------------------------------------------------------------------------- files and folders

HUB_FEATURES = {
    "problem": datasets.Value("string"),
    "answer": datasets.Value("string"),
    "images": datasets.List(datasets.Image()),
}


def write_hub_parquet(path: Path, numbers, feature_type=None) -> None:
    """As push_to_hub writes it. `feature_type` renames List to a type unknown to datasets."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in numbers:
        image = {"bytes": plain((30 + i, 30)), "path": "x.png"}
        rows.append({"problem": f"<image>n{i}", "answer": str(i), "images": [image]})
    datasets.Dataset.from_list(rows, features=datasets.Features(HUB_FEATURES)).to_parquet(path)
    if feature_type:
        table = pyarrow.parquet.read_table(path)
        metadata = table.schema.metadata[b"huggingface"]
        renamed = metadata.replace(b'"List"', feature_type.encode())
        assert renamed != metadata
        table = table.replace_schema_metadata({b"huggingface": renamed})
        pyarrow.parquet.write_table(table, path)


@pytest.mark.parametrize("feature_type", [None, '"Unheard"'])
def test_a_folder_in_the_hubs_layout(tmp_path, feature_type):
    folder = tmp_path / "set[1]"  # not a pattern
    first = folder / "data/train-00000-of-00002.parquet"
    second = folder / "data/train-00001-of-00002.parquet"
    write_hub_parquet(first, range(3), feature_type)
    write_hub_parquet(second, range(3, 6), feature_type)
    write_hub_parquet(folder / "data/test-00000-of-00001.parquet", [7], feature_type)
    (folder / "README.md").write_text("x")
    (folder / "dataset_infos.json").write_text("{}")
    rows = data.load(str(folder))
    assert answers(rows) == list("012345")
    images = [example.images[0] for example in rows]
    assert [image.size for image in images] == [(30 + i, 30) for i in range(6)]
    assert all(map(is_red, images))
    assert answers(data.load(folder / "data", "test")) == ["7"]
    [(name, test)] = benchmarks.eval_sets(str(folder)).items()
    assert name == "set[1]"
    assert answers(test) == ["7"]
    with pytest.raises(data.DataError, match="no split 'validation': choose one of test, train"):
        data.load(str(folder), "validation")


def test_parquet_image_columns_and_a_rewritten_file(tmp_path):
    (tmp_path / "a.png").write_bytes(plain())
    file = tmp_path / "rows.parquet"
    columns = [[[plain()]], [["a.png"]], [{"bytes": plain(), "path": "a"}], ["a.png"]]
    for images in columns:
        columns = {"problem": ["<image>?"], "answer": [3.0], "images": images, "other": [[1]]}
        pyarrow.parquet.write_table(pyarrow.table(columns), file)
        [example] = data.load(str(file))
        assert is_red(example.images[0])
        assert example.answer == "3"
    pyarrow.parquet.write_table(pyarrow.table({"problem": ["a", "b"], "answer": [None, 4]}), file)
    os.utime(file, (1, 1))  # an older file in the place of a newer one
    rows = data.load(str(file))
    assert answers(rows) == ["4"]
    assert rows.skipped == {"empty answer": 1}


def test_parquet_rows_stay_on_disk(tmp_path):
    images = [[os.urandom(1_000_000)]] * 30
    table = pyarrow.table({"problem": ["<image>?"] * 30, "answer": ["1"] * 30, "images": images})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=5)
    del table
    before = pyarrow.total_allocated_bytes()
    table = data.read_files([tmp_path / "a.parquet"])
    assert len(table) == 30
    assert pyarrow.total_allocated_bytes() - before < 5e6  # mapped from datasets' cache, not read


def test_json_and_jsonl_files(tmp_path):
    rows = [
        {"problem": "a\u2028b", "answer": 1},
        {"problem": "c", "answer": "two"},
        {"problem": "d", "answer": 2.5},
    ]
    lines = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    contents = {
        "list.json": json.dumps(rows, ensure_ascii=False, indent=1),
        "lines.json": "\ufeff" + lines + "\n\n",
        "lines.jsonl": lines + '\n{"problem": "cut',
    }
    for name, content in contents.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
        loaded = data.load(str(tmp_path / name))
        assert [example.question for example in loaded] == ["a\u2028b", "c", "d"]
        assert answers(loaded) == ["1", "two", "2.5"]
        assert loaded.skipped == ({"not JSON": 1} if name == "lines.jsonl" else {})


def test_folders_of_json_files(tmp_path):
    write_jsonl(tmp_path / "b.jsonl", [text(1), text(2)])
    write_jsonl(tmp_path / "a.json", [text(0)])
    assert answers(data.load(str(tmp_path))) == ["0", "1", "2"]
    sets = benchmarks.eval_sets(str(tmp_path), limit=1)
    assert {name: answers(rows) for name, rows in sets.items()} == {"a": ["0"], "b": ["1"]}
    assert list(benchmarks.eval_sets(str(tmp_path / "b.jsonl"))) == ["b"]
    write_jsonl(tmp_path / "test.json", [text(7)])
    assert answers(benchmarks.eval_sets(str(tmp_path))[tmp_path.name]) == ["7"]
    with pytest.raises(data.DataError, match="no split 'train': choose one of test"):
        data.load(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere.jsonl", ["no such file or folder", ".parquet, .json, .jsonl", "owner/name"]),
        ("./a/b/c", ["no such file", "'toy'"]),
        ("table.csv", ["unknown extension '.csv'", ".parquet, .json, .jsonl"]),
        ("empty", ["no such file or folder", "a folder of such"]),
        ("bad.parquet", ["cannot be read"]),
        ("bad.json", ["cannot be read"]),
        ("latin.jsonl", ["cannot be read"]),
        ("other.jsonl", ["none of its 2 rows", "missing column 2"]),
    ],
)
def test_unusable_files_give_one_line(tmp_path, monkeypatch, name, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "table.csv").write_text("problem,answer\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 or not")
    (tmp_path / "bad.json").write_text('[{"problem": ')
    (tmp_path / "latin.jsonl").write_bytes(b'{"problem": "\xe9"}')
    write_jsonl(tmp_path / "other.jsonl", [{"text": "a"}, {"text": "b"}])
    for function in (data.load, benchmarks.eval_sets):
        with pytest.raises(data.DataError) as caught:
            function(name)
        message = str(caught.value)
        assert "\n" not in message
        assert all(word in message for word in [Path(name).stem, *words]), message


def test_the_toy():
    rows = data.load("toy", limit=3, seed=1)
    assert len(rows) == 3
    assert rows.name == "toy/train"
    assert len(data.load("toy")) == 4096
    [image] = rows[2].images
    assert rows[2].question.count("<image>") == 1
    assert rows[2].images[0].tobytes() == image.tobytes()
    assert data.load("toy", seed=2)[2].images[0].tobytes() != image.tobytes()
    sets = benchmarks.eval_sets("toy")
    assert {name: len(rows) for name, rows in sets.items()} == {
        "general": 256,
        "vision_dependent": 256,
    }
    assert len(benchmarks.eval_sets("toy", limit=5)["general"]) == 5
    choices = "'test': choose one of train, general, vision_dependent"
    with pytest.raises(data.DataError, match=choices):
        data.load("toy", "test")


# ----------------------------------------------------------------------------------------- the hub

HUB = """
import hashlib, http.server, json, os, re, sys, threading, time
from pathlib import Path

class Hub(http.server.BaseHTTPRequestHandler):
    "The few answers of huggingface.co that loading a data set takes."
    root = Path(sys.argv[1])

    def entry(self, file, repo):
        kind = "directory" if file.is_dir() else "file"
        entry = {"type": kind, "path": str(file.relative_to(repo)), "oid": "d" * 40}
        return entry if file.is_dir() else entry | {"size": file.stat().st_size}

    def reply(self, code, body, **headers):
        self.send_response(code)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        path, sha = self.path.split("?")[0], "a" * 40
        pattern = r"(/api)?/datasets/(o/[a-z]+)(?:/(resolve|tree|revision)/[^/]+)?/?(.*)"
        match = re.match(pattern, path)
        if not match or not (self.root / match[2]).is_dir():
            return self.reply(404, b"{}", X_Error_Code="RepoNotFound")
        repo = self.root / match[2]
        file = repo / match[4]
        if match[3] == "resolve" and file.is_file():
            content = file.read_bytes()
            tag = hashlib.sha1(content).hexdigest()
            return self.reply(200, content, ETag=tag, X_Repo_Commit=sha)
        if match[3] == "tree" and file.is_dir():
            recursive = "recursive=true" in self.path.lower()
            files = sorted(file.rglob("*") if recursive else file.glob("*"))
            return self.reply(200, json.dumps([self.entry(f, repo) for f in files]).encode())
        if match[1] and match[3] in (None, "revision"):
            names = [str(f.relative_to(repo)) for f in repo.rglob("*") if f.is_file()]
            info = {"id": match[2], "sha": sha, "private": False, "downloads": 0, "likes": 0,
                    "tags": [], "siblings": [{"rfilename": name} for name in names]}
            return self.reply(200, json.dumps(info).encode())
        self.reply(404, b"{}", X_Error_Code="EntryNotFound")

    do_HEAD = do_GET

    def log_message(self, *args):
        pass

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"

from support import benchmarks, data

def report(function, *args):
    try:
        result = function(*args)
    except data.DataError as error:
        print(json.dumps(str(error)))
        return
    sets = result if isinstance(result, dict) else {"": result}
    found = {name: [(r.answer, r.images[0].size) for r in rows] for name, rows in sets.items()}
    print(json.dumps(found))

report(data.load, "o/plain")
report(benchmarks.eval_sets, "o/plain")
report(data.load, "o/unheard")
report(data.load, "o/plain", "test")
report(data.load, "o/unheard", "test")
report(data.load, "o/nothing")
server.shutdown()
server.server_close()
report(data.load, "o/plain")

def slow(example):
    time.sleep(0.5)
    return example

def drop_streams():
    "Without close() either, the program does not wait for a dropped stream's 500 seconds of work."
    rows = data.usable_rows("mine", [{"problem": "?", "answer": "1"}] * 2000, Path("."))
    stream = data.Stream(rows, slow, 2, workers=2)
    next(stream)
    stream = data.Stream(rows, slow, 2000, workers=2)

drop_streams()
"""


def test_a_hub_id(tmp_path):
    """With datasets and by the parquet files, from a server that answers as the hub; then without.

    In a process of its own, because the hub's client reads its address when it is imported.
    """
    for part in range(2):
        name, numbers = f"data/train-0000{part}-of-00002.parquet", [2 * part, 2 * part + 1]
        write_hub_parquet(tmp_path / "hub/o/plain" / name, numbers)
        write_hub_parquet(tmp_path / "hub/o/unheard" / name, numbers, '"Unheard"')
    environment = {"HF_HOME": str(tmp_path / "home")}
    for key, value in os.environ.items():
        if not key.startswith("HF_") and key.lower() not in ("http_proxy", "https_proxy"):
            environment[key] = value
    command = [sys.executable, "-c", textwrap.dedent(HUB), str(tmp_path / "hub")]
    options = {"capture_output": True, "text": True, "timeout": 120}
    done = subprocess.run(command, cwd=ROOT, env=environment, **options)
    assert done.returncode == 0, done.stderr
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    loaded, evaluated, direct, no_split, no_split_direct, no_id, no_hub = reports
    expected = [[str(i), [30 + i, 30]] for i in range(4)]
    assert loaded == direct == {"": expected}
    assert evaluated == {"plain": expected}
    warning = "'o/unheard': its parquet files are read directly (Feature type 'Unheard' not found"
    assert warning in done.stderr
    assert "'o/plain': its parquet files" not in done.stderr
    assert "no split 'test': choose one of train" in no_split
    assert "no split 'test': choose one of train" in no_split_direct
    assert "'o/nothing' is not a file or folder here" in no_id
    assert "404" in no_id
    assert "'o/plain' is not a file or folder here" in no_hub
    assert "Connect" in no_hub
    assert not any("\n" in line for line in (no_split, no_id, no_hub))


def test_a_hub_id_offline(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(data.DataError, match="'o/plain' is not a file or folder here.* offline"):
        data.load("o/plain")


# -------------------------------------------------------------------------------------- the stream


def texts(n: int) -> data.Rows:
    return usable([text(i) for i in range(n)])


def flat(prompts) -> list:
    return [(index, example.answer) for index, example in prompts]


@pytest.fixture
def stream():
    """data.Stream, closed after the test."""
    streams = []

    def make(*args, **options):
        streams.append(data.Stream(*args, **options))
        return streams[-1]

    yield make
    for made in streams:
        made.close()


def identity(example):
    return example


def test_the_same_rounds_on_any_number_of_ranks(stream):
    rows = texts(11)
    single = stream(rows, identity, 4, seed=5)
    rounds = [flat(next(single)) for _ in range(6)]
    assert all([index for index, _ in prompts] == [0, 1, 2, 3] for prompts in rounds)
    for world in (2, 4, 3, 5):
        ranks = [stream(rows, identity, 4, rank=rank, world=world, seed=5) for rank in range(world)]
        for prompts in rounds:
            shares = [flat(next(rank)) for rank in ranks]
            for rank, share in enumerate(shares):
                assert all(index % world == rank for index, _ in share)
            assert sorted(sum(shares, [])) == prompts
    other = stream(rows, identity, 4, seed=6)
    assert [flat(next(other)) for _ in range(6)] != rounds


def test_epochs_are_fresh_permutations(stream):
    rounds = stream(texts(12), identity, 6)
    epochs = []
    for _ in range(4):
        epochs.append([answer for _ in range(2) for _, answer in flat(next(rounds))])
    assert all(sorted(epoch, key=int) == [str(i) for i in range(12)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    longer = stream(texts(5), identity, 8)  # rounds longer than an epoch
    order = [answer for _ in range(5) for _, answer in flat(next(longer))]
    assert all(sorted(order[i : i + 5]) == list("01234") for i in range(0, 40, 5))


def test_a_position_resumes_exactly(stream):
    rows = texts(10)
    uninterrupted = stream(rows, identity, 4, seed=1)
    assert uninterrupted.position == 0
    rounds = []
    for k in range(7):
        rounds.append(flat(next(uninterrupted)))
        assert uninterrupted.position == 4 * (k + 1)  # the round being encoded does not count
    for k in range(7):
        resumed = stream(rows, identity, 4, seed=1, position=4 * k)
        assert [flat(next(resumed)) for _ in range(7 - k)] == rounds[k:]


def test_bad_rows_are_left_out_and_counted(stream, capsys):
    table = [text(i) for i in range(8)]
    table[2] = table[5] = row(truncated(noise()))

    def encode(example):
        if example.answer == "7":
            raise ValueError("absolute aspect ratio must be smaller than 200")
        return example

    rounds = stream(usable([BROKEN["markers"], *table]), encode, 8)
    capsys.readouterr()
    first, second = next(rounds), next(rounds)
    for prompts in (first, second):
        assert sorted(answer for _, answer in flat(prompts)) == ["0", "1", "3", "4", "6"]
    assert rounds.skipped == {"broken image": 4, "refused": 2}
    assert rounds.position == 16
    broken, refused = sorted(capsys.readouterr().err.splitlines())
    starts = ("mine: row 3 is skipped, broken image", "mine: row 6 is skipped, broken image")
    assert broken.startswith(starts)
    assert "mine: row 8 is skipped, absolute aspect ratio" in refused
    usual = [data.shuffled(8, 0, 0).index(i) for i in (0, 1, 3, 4, 6)]
    assert sorted(index for index, _ in first) == sorted(usual)  # the others keep their index


def test_a_bug_in_encode_is_raised_and_endless_failure_ends(stream):
    def bug(example):
        raise TypeError("a bug")

    def refuse(example):
        raise ValueError("no such size")

    with pytest.raises(TypeError, match="a bug"):
        next(stream(texts(4), bug, 2))
    failing = stream(texts(4), refuse, 2)
    with pytest.raises(StepError, match="64 prompts in a row cannot be used, no such size"):
        for _ in range(100):
            assert next(failing) == []
    assert failing.skipped == {"refused": 64}

    calls = iter(range(400))

    def refuse_most(example):
        return example if next(calls) % 20 == 0 else refuse(example)

    flaky = stream(texts(4), refuse_most, 4, workers=1)
    assert sum(len(next(flaky)) for _ in range(80)) == 16  # 19 in a row are bad luck


@pytest.mark.parametrize("of", ["training", "evaluation"])
def test_the_next_round_is_encoded_while_the_caller_works(stream, of):
    first_returned, second_started = threading.Event(), threading.Event()
    calls, lock = [], threading.Lock()

    def encode(example, index=0):
        with lock:
            calls.append(example.answer)
            in_second_round = len(calls) > 4
        if in_second_round:
            second_started.set()
            first_returned.wait(60)
        return example

    if of == "training":
        rounds = stream(texts(16), encode, 4, workers=2)
    else:
        rounds = data.encode_ahead(texts(16), encode, [[0, 1, 2, 3], [4, 5, 6, 7]])
    assert len(next(rounds)) == 4  # would never return if it waited for the second round
    assert second_started.wait(60)  # though nobody has asked for it yet
    first_returned.set()
    assert len(next(rounds)) == 4


def test_close_drops_what_is_queued():
    gate, started = threading.Event(), []

    def encode(example):
        started.append(example.answer)
        gate.wait(60)
        return example

    rounds = data.Stream(texts(50), encode, 50, workers=2)
    rounds.close()
    gate.set()
    rounds._pool.shutdown(wait=True)
    assert len(started) <= 2
    rounds.close()  # twice is fine
    with pytest.raises(RuntimeError):
        next(rounds)
