"""data.py: every form a row and an image may come in, every way it can be broken, and the stream over them."""

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
from PIL import Image

from support import benchmarks, data
from support.batch import Example

ROOT = Path(__file__).resolve().parent.parent
RED = (250, 0, 0)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.delenv("RANK", raising=False)


def encoded(size=(40, 30), form="PNG", mode="RGB", color=RED, **options) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, color).save(buffer, form, **options)
    return buffer.getvalue()


def noise(size=(200, 200), form="PNG") -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


def row(image=None, **changes) -> dict:
    return {
        "problem": "<image>How many?",
        "answer": "3",
        "images": [encoded() if image is None else image],
    } | changes


def text(i) -> dict:
    return {"problem": f"What is {i} + 0?", "answer": str(i)}


def rows_of(table, **options) -> data.Rows:
    return data.select("mine", table, Path("."), **options)


def is_red(image: Image.Image) -> bool:
    middle = image.getpixel((image.width // 2, image.height // 2))
    return image.mode == "RGB" and max(abs(a - b) for a, b in zip(middle, RED, strict=True)) < 10


def write_jsonl(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(r) for r in rows) + "\n")
    return path


# ------------------------------------------------------------------------------------------- forms of rows and images


@pytest.mark.parametrize(
    "form",
    ["bytes", "dict", "dict with a path", "path", "absolute", "pil", "one string", "one dict"],
)
def test_image_forms(tmp_path, form):
    (tmp_path / "pictures").mkdir()
    file = tmp_path / "pictures" / "a.png"
    file.write_bytes(encoded())
    name = "pictures/a.png"
    images = {
        "bytes": [encoded()],
        "dict": [{"bytes": encoded(), "path": "elsewhere.png"}],
        "dict with a path": [{"bytes": None, "path": name}],
        "path": [name],
        "absolute": [str(file)],
        "pil": [Image.new("RGB", (40, 30), RED)],
        "one string": name,
        "one dict": {"path": name},
    }[form]
    rows = data.select("mine", [row(images=images)], tmp_path)
    [image] = rows[0].images
    assert image.size == (40, 30) and is_red(image) and not rows.skipped


@pytest.mark.parametrize(
    ("mode", "color", "form"),
    [
        ("CMYK", (0, 255, 255, 0), "JPEG"),
        ("RGBA", (*RED, 255), "PNG"),
        ("RGBA", (*RED, 0), "PNG"),  # invisible, and still red: as the released code has it
        ("RGBA", (*RED, 0), "WEBP"),
        ("P", None, "PNG"),
        ("P", None, "GIF"),
    ],
)
def test_image_modes_become_rgb(mode, color, form):
    if mode == "P":
        buffer = io.BytesIO()
        image = Image.new("P", (40, 30), 1)
        image.putpalette([0, 0, 0, *RED, 0, 0, 250])
        image.save(buffer, form, transparency=1)
        source = buffer.getvalue()
        assert Image.open(io.BytesIO(source)).mode == "P"
    else:
        options = {"lossless": True, "exact": True} if form == "WEBP" else {}
        source = encoded(mode=mode, color=color, form=form, **options)
    assert is_red(rows_of([row(source)])[0].images[0])


def test_grey_bilevel_and_16_bit_images():
    def value(image):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        result = rows_of([row(buffer.getvalue())])[0].images[0]
        assert result.mode == "RGB"
        return result.getpixel((0, 0))

    assert value(Image.new("L", (40, 30), 77)) == (77,) * 3
    assert value(Image.new("LA", (40, 30), (77, 0))) == (77,) * 3
    assert value(Image.new("1", (40, 30), 1)) == (255,) * 3
    for deep, shallow in ((0, 0), (77 * 256, 77), (65535, 255)):
        assert value(Image.fromarray(np.full((30, 40), deep, dtype=np.uint16))) == (shallow,) * 3


def test_exif_orientation_is_applied_and_broken_exif_ignored():
    image = Image.new("RGB", (40, 30), RED)
    image.paste((0, 0, 250), (0, 0, 20, 30))  # the left half is blue
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise: blue on top
    for form in ("PNG", "WEBP", "JPEG"):
        buffer = io.BytesIO()
        image.save(buffer, form, exif=exif)
        [upright] = rows_of([row(buffer.getvalue())])[0].images
        assert upright.size == (30, 40)
        assert upright.getpixel((15, 5))[2] > 200 and upright.getpixel((15, 35))[0] > 200
        buffer = io.BytesIO()
        image.save(buffer, form, exif=b"Exif\0\0rubbish")
        assert rows_of([row(buffer.getvalue())])[0].images[0].size == (40, 30)


def test_twenty_megapixels_are_fine_and_a_bomb_is_not(capsys, monkeypatch):
    table = [row(encoded((5000, 4000), "JPEG"))]
    assert rows_of(table)[0].images[0].size == (5000, 4000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5_000_000)  # PIL refuses more than twice as many
    with pytest.raises(data.DataError, match="broken image 1"):
        rows_of(table)
    assert "decompression bomb" in capsys.readouterr().err


def test_several_images_text_only_rows_and_pre_masked_images():
    blue = encoded(color=(0, 0, 250))
    rows = rows_of(
        [
            {
                "problem": "<image>or<image>?",
                "answer": "a",
                "images": [encoded(), blue],
                "images_aug": [blue, encoded()],
            },
            text(1),
            {**text(2), "images": None},
            {**text(3), "images": [], "images_aug": []},
            {**text(4), "images": [None]},
        ]
    )
    assert len(rows) == 5 and not rows.skipped
    first = rows[0]
    assert [is_red(x) for x in first.images] == [True, False] and [
        is_red(x) for x in first.images_aug
    ] == [False, True]
    assert all(rows[i].images == [] and rows[i].images_aug is None for i in range(1, 5))


def test_answers_become_strings_and_ids_are_kept():
    answers = [
        ("x", "x"),
        (3, "3"),
        (3.0, "3"),
        (2.5, "2.5"),
        (True, "True"),
        (0, "0"),
        (-1, "-1"),
        (False, "False"),
    ]
    rows = rows_of([{"problem": "?", "answer": answer} for answer, _ in answers])
    assert [r.answer for r in rows] == [expected for _, expected in answers]
    assert [r.id for r in rows] == [str(i) for i in range(len(answers))]
    assert rows_of([{**text(0), "id": 17}, {**text(0), "id": "geo_1"}])[1].id == "geo_1"


def test_question_column_and_sharegpt_rows(tmp_path):
    (tmp_path / "S_images").mkdir()
    (tmp_path / "S_images" / "1.png").write_bytes(encoded())
    turns = [{"role": "user", "content": "<image>How many?"}, {"role": "assistant", "content": "3"}]
    file = write_jsonl(
        tmp_path / "S.json", [{"messages": turns, "images": ["S_images/1.png"], "id": "s1"}]
    )
    [example] = data.load(str(file))
    assert (example.question, example.answer, example.id) == (
        "<image>How many?",
        "3",
        "s1",
    ) and is_red(example.images[0])
    assert rows_of([{"question": "Why?", "answer": "so"}])[0].question == "Why?"
    for wrong in (
        turns[:1],
        turns * 2,
        turns[::-1],
        [{"role": "system", "content": "x"}, *turns],
        [],
        "text",
    ):
        with pytest.raises(data.DataError, match="messages 1"):
            rows_of([{"messages": wrong, "images": []}])


# -------------------------------------------------------------------------------------------------------- broken rows

BROKEN = {
    "not a row": 7,
    "not JSON": '{"problem": "cut o',
    "missing column": {"problem": "?", "text": "?"},
    "empty question": {"problem": " ", "answer": "1"},
    "empty answer": {"problem": "?", "answer": None},
    "answer is no text": {"problem": "?", "answer": ["1"]},
    "question is no text": {"problem": {"text": "?"}, "answer": "1"},
    "markers": row(problem="<image><image>?"),
    "images_aug": row(images_aug=[encoded()] * 2),
    "broken image": row(b"rubbish"),
    "aspect ratio": row(encoded((4020, 20))),
    "messages": {"messages": [{"role": "user", "content": "?"}]},
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_rows_are_skipped_named_once_and_counted(kind, capsys):
    rows = rows_of([text(0), BROKEN[kind], text(2), BROKEN[kind], text(4)])
    assert (
        rows.skipped == {kind: 2}
        and [r.answer for r in rows] == ["0", "2", "4"]
        and rows.numbers == [0, 2, 4]
    )
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"mine: row 1 is skipped, {kind}: ") and len(line) < 320


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (row(b""), "0 bytes"),
        (row({"bytes": b"", "path": None}), "0 bytes"),
        (row({"bytes": None, "path": None}), "None"),
        (row(3), "3"),
        (row("nowhere.png"), "nowhere.png"),
        (row("."), "."),
        (row("a\0b.png"), "a\0b.png"),
        (row(encoded()[:20]), "20 bytes"),
        (row(problem="no marker"), "0 <image> markers for 1 images: no marker"),
        (row(images=[]), "1 <image> markers for 0 images"),
        ({"problem": "?", "answer": float("nan")}, "nan"),
        ({"problem": "?", "answer": ""}, "''"),
        ({"problem": "?"}, "answer; the row has problem"),
        (row(encoded((4020, 20))), "4020 x 20"),
    ],
)
def test_the_line_names_the_value(value, words, capsys):
    assert len(rows_of([value, text(1)])) == 1
    assert words in capsys.readouterr().err


def test_first_of_each_kind_in_a_mixed_set_and_only_on_rank_0(capsys, monkeypatch):
    table = [*BROKEN.values(), text(0), *BROKEN.values()]
    assert rows_of(table).skipped == Counter({kind: 2 for kind in BROKEN})
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(BROKEN)
    for number, (kind, line) in enumerate(zip(BROKEN, lines, strict=True)):
        assert line.startswith(f"mine: row {number} is skipped, {kind}: ")
    monkeypatch.setenv("RANK", "1")
    assert rows_of(table).skipped == Counter({kind: 2 for kind in BROKEN})
    assert capsys.readouterr().err == ""


def test_no_usable_row_is_one_line_with_the_counts():
    with pytest.raises(data.DataError) as caught:
        rows_of([BROKEN["markers"], BROKEN["empty answer"], BROKEN["markers"]])
    assert (
        str(caught.value)
        == "data 'mine': none of its 3 rows can be used (markers 2, empty answer 1)"
    )
    with pytest.raises(data.DataError, match="none of its 0 rows"):
        rows_of([])


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_truncated_pixels_are_found_on_decoding(form):
    whole = noise(form=form)
    rows = rows_of([row(whole[: len(whole) // 2]), row(whole)])
    assert len(rows) == 2 and not rows.skipped
    with pytest.raises(data.BadRow, match="broken image") as caught:
        rows[0]
    assert caught.value.kind == "broken image"
    assert rows[1].images[0].size == (200, 200)


def test_a_picture_deleted_after_loading_is_a_bad_row(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded())
    rows = data.select("mine", [row("a.png")], tmp_path)
    (tmp_path / "a.png").unlink()
    with pytest.raises(data.BadRow, match="a.png"):
        rows[0]


def test_overlong_prompts_are_filtered_from_headers_alone(capsys):
    whole = noise((600, 400))
    seen = []

    def length(question, sizes):
        seen.append((question, sizes))
        if "spells" in question:
            raise ValueError("the question spells out an image token")
        return len(question) + sum(w * h // 784 for w, h in sizes)

    half = whole[: len(whole) // 2]  # its pixels cannot be decoded
    big = row(half, problem="<image>big?", images_aug=[half])
    small = row(encoded((28, 28)), problem="<image>small?")
    rows = rows_of(
        [big, small, text(0), {**text(1), "problem": "spells"}],
        length=length,
        max_prompt_tokens=100,
    )
    assert rows.skipped == {"overlong": 1, "refused": 1} and rows.numbers == [1, 2]
    assert seen[:3] == [
        ("<image>big?", [(600, 400)]),
        ("<image>small?", [(28, 28)]),
        ("What is 0 + 0?", []),
    ]
    assert "row 0 is skipped, overlong: 317 prompt tokens, more than 100" in capsys.readouterr().err
    assert len(rows_of([big, small], length=length)) == 2


def test_limit_takes_the_first_usable_rows():
    table = [BROKEN["markers"], text(1), BROKEN["markers"], text(3), text(4)]
    rows = rows_of(table, limit=2)
    assert rows.numbers == [1, 3] and rows.skipped == {"markers": 2}
    assert rows_of(table, limit=100).numbers == rows_of(table, limit=0).numbers == [1, 3, 4]


# -------------------------------------------------------------------------------------------------- files and folders

HUB_FEATURES = {
    "problem": datasets.Value("string"),
    "answer": datasets.Value("string"),
    "images": datasets.List(datasets.Image()),
}


def write_hub_parquet(path: Path, numbers, feature_type=None) -> None:
    """As push_to_hub writes it; `feature_type` renames List in the metadata to something this version does not know."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "problem": f"<image>n{i}",
            "answer": str(i),
            "images": [{"bytes": encoded((30 + i, 30)), "path": "x.png"}],
        }
        for i in numbers
    ]
    datasets.Dataset.from_list(rows, features=datasets.Features(HUB_FEATURES)).to_parquet(path)
    if feature_type:
        table = pyarrow.parquet.read_table(path)
        metadata = {
            k: v.replace(b'"List"', feature_type.encode()) for k, v in table.schema.metadata.items()
        }
        assert metadata != table.schema.metadata
        pyarrow.parquet.write_table(table.replace_schema_metadata(metadata), path)


@pytest.mark.parametrize("feature_type", [None, '"Unheard"'])
def test_a_folder_in_the_hubs_layout(tmp_path, feature_type):
    folder = tmp_path / "set[1]"  # no pattern
    for part in range(2):
        write_hub_parquet(
            folder / f"data/train-0000{part}-of-00002.parquet",
            range(3 * part, 3 * part + 3),
            feature_type,
        )
    write_hub_parquet(folder / "data/test-00000-of-00001.parquet", [7], feature_type)
    (folder / "README.md").write_text("x")
    (folder / "dataset_infos.json").write_text("{}")
    rows = data.load(str(folder))
    assert [r.answer for r in rows] == list("012345")
    assert [r.images[0].size for r in rows] == [(30 + i, 30) for i in range(6)] and all(
        is_red(r.images[0]) for r in rows
    )
    assert [r.answer for r in data.load(folder / "data", "test")] == ["7"]
    [(name, test)] = benchmarks.eval_sets(str(folder)).items()
    assert name == "set[1]" and [r.answer for r in test] == ["7"]
    with pytest.raises(data.DataError, match="no split 'validation': choose one of test, train"):
        data.load(str(folder), "validation")


def test_parquet_image_columns_and_a_rewritten_file(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded())
    columns = {
        "bytes": [[encoded()]],
        "paths": [["a.png"]],
        "struct": [{"bytes": encoded(), "path": "a"}],
        "path": ["a.png"],
    }
    for name, images in columns.items():
        table = pyarrow.table(
            {"problem": ["<image>?"], "answer": [3.0], "images": images, "other": [[1]]}
        )
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet")
        [example] = data.load(str(tmp_path / f"{name}.parquet"))
        assert is_red(example.images[0]) and example.answer == "3"
    file = tmp_path / "path.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"problem": ["a", "b"], "answer": [None, 4]}), file)
    os.utime(file, (1, 1))
    rows = data.load(str(file))
    assert [r.answer for r in rows] == ["4"] and rows.skipped == {"empty answer": 1}


def test_parquet_rows_stay_on_disk(tmp_path):
    pixels = os.urandom(1_000_000)
    table = pyarrow.table(
        {"problem": ["<image>?"] * 30, "answer": ["1"] * 30, "images": [[pixels]] * 30}
    )
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=5)
    del table
    before = pyarrow.total_allocated_bytes()
    [(table, _)] = data.find(str(tmp_path / "a.parquet"), ("train",)).values()
    assert (
        len(table) == 30 and pyarrow.total_allocated_bytes() - before < 5e6
    )  # mapped from the cache, not read


def test_json_and_jsonl_files(tmp_path):
    rows = [
        {"problem": "a\u2028b", "answer": 1},
        {"problem": "c", "answer": "two"},
        {"problem": "d", "answer": 2.5},
    ]
    (tmp_path / "list.json").write_text(
        json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8"
    )
    lines = "\r\n".join(json.dumps(r, ensure_ascii=False) for r in rows)
    (tmp_path / "lines.json").write_text("\ufeff" + lines + "\n\n", encoding="utf-8")
    (tmp_path / "lines.jsonl").write_text(lines + '\n{"problem": "cut', encoding="utf-8")
    for name in ("list.json", "lines.json", "lines.jsonl"):
        loaded = data.load(str(tmp_path / name))
        assert [(r.question, r.answer) for r in loaded] == [
            ("a\u2028b", "1"),
            ("c", "two"),
            ("d", "2.5"),
        ]
        assert loaded.skipped == ({"not JSON": 1} if name == "lines.jsonl" else {})


def test_folders_of_json_files(tmp_path):
    write_jsonl(tmp_path / "b.jsonl", [text(1), text(2)])
    write_jsonl(tmp_path / "a.json", [text(0)])
    assert [r.answer for r in data.load(str(tmp_path))] == ["0", "1", "2"]
    sets = benchmarks.eval_sets(str(tmp_path), limit=1)
    assert {name: [r.answer for r in rows] for name, rows in sets.items()} == {
        "a": ["0"],
        "b": ["1"],
    }
    write_jsonl(tmp_path / "test.json", [text(7)])
    assert [r.answer for r in benchmarks.eval_sets(str(tmp_path))[tmp_path.name]] == ["7"]
    assert list(benchmarks.eval_sets(str(tmp_path / "b.jsonl"))) == ["b"]
    with pytest.raises(data.DataError, match="no split 'train': choose one of test"):
        data.load(str(tmp_path))
    with pytest.raises(data.DataError, match="no split 'train': choose one of test"):
        data.load(str(tmp_path), "train")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "nowhere.jsonl",
            [
                "nowhere.jsonl",
                "no such file or folder",
                ".parquet, .json, .jsonl",
                "owner/name",
                "'toy'",
            ],
        ),
        ("data/train.parquet", ["data/train.parquet", "no such file"]),
        ("./a/b/c", ["./a/b/c", "no such file"]),
        ("toyy", ["toyy", "no such file", "'toy'"]),
        ("table.csv", ["table.csv", "unknown extension '.csv'", ".parquet, .json, .jsonl"]),
        ("empty", ["empty", "no such file or folder", "a folder of such"]),
        ("bad.parquet", ["bad.parquet", "cannot be read"]),
        ("bad.json", ["bad.json", "cannot be read"]),
        ("latin.jsonl", ["latin.jsonl", "cannot be read"]),
        ("other.jsonl", ["other", "none of its 2 rows", "missing column 2"]),
    ],
)
@pytest.mark.parametrize("function", [data.load, benchmarks.eval_sets])
def test_unusable_files_are_one_line(tmp_path, monkeypatch, name, words, function):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "table.csv").write_text("problem,answer\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 or not")
    (tmp_path / "bad.json").write_text('[{"problem": ')
    (tmp_path / "latin.jsonl").write_bytes(b'{"problem": "\xe9"}')
    write_jsonl(tmp_path / "other.jsonl", [{"text": "a"}, {"text": "b"}])
    with pytest.raises(data.DataError) as caught:
        function(name)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_the_toy():
    rows = data.load("toy", limit=3, seed=1)
    assert len(rows) == 3 and rows.name == "toy/train" and len(data.load("toy")) == 4096
    example = rows[2]
    assert (
        isinstance(example, Example)
        and example.question.count("<image>") == len(example.images) == 1
    )
    assert (
        rows[2].question == example.question
        and rows[2].images[0].tobytes() == example.images[0].tobytes()
    )
    assert data.load("toy", seed=2)[2].images[0].tobytes() != example.images[0].tobytes()
    assert {name: len(r) for name, r in benchmarks.eval_sets("toy").items()} == {
        "general": 256,
        "vision_dependent": 256,
    }
    assert len(benchmarks.eval_sets("toy", limit=5)["general"]) == 5
    with pytest.raises(
        data.DataError, match="'test': choose one of train, general, vision_dependent"
    ):
        data.load("toy", "test")


# ------------------------------------------------------------------------------------------------------------ the hub

HUB = """
import hashlib, http.server, json, os, re, sys, threading
from pathlib import Path

class Hub(http.server.BaseHTTPRequestHandler):
    "The few answers of huggingface.co that loading a data set takes."
    root = Path(sys.argv[1])

    def entry(self, file, repo):
        entry = {"type": "directory" if file.is_dir() else "file", "path": str(file.relative_to(repo)), "oid": "d" * 40}
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
        match = re.match(r"(/api)?/datasets/(o/[a-z]+)(?:/(resolve|tree|revision)/[^/]+)?/?(.*)", path)
        if not match or not (self.root / match[2]).is_dir():
            return self.reply(404, b"{}", X_Error_Code="RepoNotFound")
        repo, place = self.root / match[2], self.root / match[2] / match[4]
        if match[3] == "resolve" and place.is_file():
            content = place.read_bytes()
            return self.reply(200, content, ETag=hashlib.sha1(content).hexdigest(), X_Repo_Commit=sha)
        if match[3] == "tree" and place.is_dir():
            files = place.rglob("*") if "recursive=true" in self.path.lower() else place.glob("*")
            return self.reply(200, json.dumps([self.entry(f, repo) for f in sorted(files)]).encode())
        if match[1] and match[3] in (None, "revision"):
            names = [str(f.relative_to(repo)) for f in repo.rglob("*") if f.is_file()]
            info = {"id": match[2], "sha": sha, "private": False, "downloads": 0, "likes": 0, "tags": [],
                    "siblings": [{"rfilename": name} for name in names]}
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
        sets = result if isinstance(result, dict) else {"": result}
        print(json.dumps({name: [(r.answer, r.images[0].size) for r in rows] for name, rows in sets.items()}))
    except data.DataError as error:
        print(json.dumps(str(error)))

report(data.load, "o/plain")
report(benchmarks.eval_sets, "o/plain")
report(data.load, "o/unheard")
report(data.load, "o/plain", "test")
report(data.load, "o/unheard", "test")
report(data.load, "o/nothing")
server.shutdown()
server.server_close()
report(data.load, "o/plain")
"""


def run_python(code: str, *args: str, **environment: str) -> subprocess.CompletedProcess:
    clean = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith("HF_") and k.lower() not in ("http_proxy", "https_proxy")
    }
    command = [sys.executable, "-c", textwrap.dedent(code), *args]
    return subprocess.run(
        command, cwd=ROOT, env=clean | environment, capture_output=True, text=True, timeout=120
    )


def test_a_hub_id(tmp_path):
    """Through `datasets`, then by the parquet files, against a server that answers as the hub does; then without it."""
    for part in range(2):
        name = f"data/train-0000{part}-of-00002.parquet"
        write_hub_parquet(tmp_path / "hub/o/plain" / name, [2 * part, 2 * part + 1])
        write_hub_parquet(tmp_path / "hub/o/unheard" / name, [2 * part, 2 * part + 1], '"Unheard"')
    done = run_python(HUB, str(tmp_path / "hub"), HF_HOME=str(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    loaded, evaluated, direct, no_split, no_split_direct, no_id, no_hub = map(
        json.loads, done.stdout.splitlines()
    )
    expected = [[str(i), [30 + i, 30]] for i in range(4)]
    assert loaded == direct == {"": expected} and evaluated == {"plain": expected}
    assert (
        "'o/unheard': its parquet files are read directly (Feature type 'Unheard' not found"
        in done.stderr
    )
    assert "'o/plain': its parquet files" not in done.stderr
    assert (
        "no split 'test': choose one of train" in no_split and "no split 'test'" in no_split_direct
    )
    assert "'o/nothing' is no file or folder here" in no_id and "404" in no_id
    assert (
        "'o/plain' is no file or folder here" in no_hub
        and "ConnectError" in no_hub
        or "Connection" in no_hub
    )
    assert not any("\n" in line for line in (no_split, no_id, no_hub))


# --------------------------------------------------------------------------------------------------------- the stream


def texts(n: int) -> data.Rows:
    return rows_of([text(i) for i in range(n)])


def answers(prompts) -> list:
    return [(i, example.answer) for i, example in prompts]


@pytest.fixture
def stream():
    """data.Stream, closed after the test."""
    made = []

    def make(*args, **options):
        made.append(data.Stream(*args, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def same(example):
    return example


def test_the_same_rounds_on_any_number_of_ranks(stream):
    rows = texts(11)
    alone = stream(rows, same, 4, seed=5)
    rounds = [answers(next(alone)) for _ in range(6)]
    assert all([i for i, _ in one] == [0, 1, 2, 3] for one in rounds)
    for world in (2, 4, 3, 5):
        shares = [stream(rows, same, 4, rank=rank, world=world, seed=5) for rank in range(world)]
        for one in rounds:
            parts = [answers(next(share)) for share in shares]
            assert all(i % world == rank for rank, part in enumerate(parts) for i, _ in part)
            assert sorted(sum(parts, [])) == one
    other = stream(rows, same, 4, seed=6)
    assert [answers(next(other)) for _ in range(6)] != rounds


def test_epochs_are_fresh_permutations(stream):
    one = stream(texts(12), same, 6)
    epochs = []
    for k in range(4):
        epochs.append([answer for _ in range(2) for _, answer in answers(next(one))])
        assert one.position == 12 * (k + 1) and one.epoch == k + 1
    assert all(sorted(epoch, key=int) == [str(i) for i in range(12)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    across = stream(texts(5), same, 8)  # rounds longer than an epoch
    flat = [answer for _ in range(5) for _, answer in answers(next(across))]
    assert all(sorted(flat[i : i + 5]) == list("01234") for i in range(0, 40, 5))
    assert across.epoch == 8.0


def test_a_position_resumes_exactly(stream):
    rows = texts(10)
    whole = stream(rows, same, 4, seed=1)
    assert whole.position == 0
    rounds = []
    for k in range(7):
        rounds.append(answers(next(whole)))
        assert whole.position == 4 * (k + 1)  # the round that is loading ahead does not count
    for k in range(7):
        resumed = stream(rows, same, 4, seed=1, position=4 * k)
        assert [answers(next(resumed)) for _ in range(7 - k)] == rounds[k:]


def test_bad_rows_are_left_out_and_counted(stream, capsys):
    whole = noise()
    table = [row(whole[: len(whole) // 2]) if i in (2, 5) else text(i) for i in range(8)]

    def encode(example):
        if example.answer == "7":
            raise ValueError("absolute aspect ratio must be smaller than 200")
        return example

    one = stream(rows_of([BROKEN["markers"], *table]), encode, 8)
    capsys.readouterr()
    first, second = next(one), next(one)
    for prompts in (first, second):
        assert sorted(e.answer for _, e in prompts) == ["0", "1", "3", "4", "6"]
    assert one.skipped == {"broken image": 4, "refused": 2} and one.position == 16
    lines = sorted(capsys.readouterr().err.splitlines())
    assert len(lines) == 2 and "mine: row 8 is skipped, absolute aspect ratio" in lines[1]
    assert lines[0].startswith(
        ("mine: row 3 is skipped, broken image", "mine: row 6 is skipped, broken image")
    )
    order = [data.shuffled(8, 0, 0).index(i) for i in (0, 1, 3, 4, 6)]
    assert sorted(i for i, _ in first) == sorted(order)  # the others keep their places


def test_a_bug_in_encode_is_raised_and_endless_failure_ends(stream):
    def bug(example):
        raise TypeError("a bug")

    def refuse(example):
        raise ValueError("no such size")

    with pytest.raises(TypeError, match="a bug"):
        next(stream(texts(4), bug, 2))
    failing = stream(texts(4), refuse, 2)
    with pytest.raises(data.DataError, match="64 prompts in a row cannot be used, no such size"):
        for _ in range(100):
            assert next(failing) == []
    assert failing.skipped == {"refused": 64}

    flags = iter(range(400))
    flaky = stream(
        texts(4),
        lambda example: example if next(flags) % 20 == 0 else refuse(example),
        4,
        workers=1,
    )
    assert sum(len(next(flaky)) for _ in range(80)) == 16  # 19 in a row are bad luck


def test_the_next_round_loads_while_the_caller_works(stream):
    returned, ahead = threading.Event(), threading.Event()
    calls, lock = [], threading.Lock()

    def encode(example):
        with lock:
            calls.append(example.answer)
            later = len(calls) > 4
        if later:  # a prompt of the second round
            ahead.set()
            returned.wait(60)
        return example

    one = stream(texts(16), encode, 4, workers=2)
    first = next(one)  # would never come if it waited for the second round
    assert len(first) == 4 and ahead.wait(60)  # nobody has asked for the second round yet
    assert one.position == 4
    returned.set()
    assert len(next(one)) == 4 and one.position == 8


def test_close_drops_what_is_queued():
    gate, started = threading.Event(), []

    def encode(example):
        started.append(example.answer)
        gate.wait(60)
        return example

    one = data.Stream(texts(50), encode, 50, workers=2)
    one.close()
    gate.set()
    one._pool.shutdown(wait=True)
    assert len(started) <= 2
    one.close()  # twice is fine
    with pytest.raises(RuntimeError):
        next(one)


def test_offline_is_one_line_and_a_program_that_forgets_to_close_ends(tmp_path):
    code = """
    import time
    from support import data

    def slow(example):
        time.sleep(0.5)
        return example

    def main():
        try:
            data.load("o/plain")
        except data.DataError as error:
            print(error)
        rows = data.select("mine", [{"problem": "?", "answer": "1"}] * 2000, ".")
        stream = data.Stream(rows, slow, 2, workers=2)
        next(stream)
        stream = data.Stream(rows, slow, 2000, workers=2)  # 500 seconds of work under way

    main()
    """
    done = run_python(code, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    [line] = done.stdout.splitlines()
    assert "'o/plain' is no file or folder here" in line and "ffline" in line
