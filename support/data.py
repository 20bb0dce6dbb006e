"""Rows -> examples (the toy, a hub id, a parquet, JSON or JSONL file, a folder of them), and the stream a rank reads.

Place in the pipeline: `load` (training), `eval_sets` and `benchmarks` (evaluation: the paper's nine) give `Rows`;
`Stream` shuffles and encodes them.
A row is `problem` (or `question`), `answer`, `images`, perhaps `images_aug` and `id`; or sharegpt: `messages` of a user
(the question) and an assistant (the answer), and `images`. The question's `<image>` markers, one an image, say where
they go. An image is {bytes, path}, bytes, a path (relative ones start at the data file's folder) or a PIL image.
A row that cannot be used is skipped and counted; the first of each kind is named on stderr. Row numbers start at 0.

Against the released loader:
1. Broken, empty and mismatched rows are left out; there they end the run or slip in. Images without any marker are a
   mismatch, too: guessing where they go could change what the question means.
2. Overlong prompts are found from image headers alone, and images are not decoded before their row is asked for.
3. Images become RGB as there, by PIL's convert: transparency is dropped, not laid over white. But 16-bit grey is scaled
   to 8 bits (PIL clips it), EXIF orientation is applied, and resizing is the image processor's alone.
4. As there, the parquet files of a hub id that `datasets` cannot read (before 4 it does not know the feature type
   "List") are read directly, by their plain Arrow types. Local files always are.
5. The order depends on seed and epoch alone: a round is the same prompts on any number of ranks.

    python -c "import data; rows = data.load('toy'); print(len(rows), rows[0])"
"""

from __future__ import annotations

import json
import os
import random
import re
import struct
import sys
import weakref
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from support import toy
from support.batch import Example

SUFFIXES = (".parquet", ".json", ".jsonl")


SPLITS = ("test", "validation", "val", "train")  # where evaluation looks, in this order


GIVE_UP = 64  # unusable prompts in a row end the run


# What PIL raises on broken files. More than twice Image.MAX_IMAGE_PIXELS (179 megapixels) is a decompression bomb.
IMAGE_ERRORS = (OSError, ValueError, SyntaxError, TypeError, IndexError, KeyError, EOFError, OverflowError,
                struct.error, zlib.error, zipfile.BadZipFile,
                Image.DecompressionBombError, Image.DecompressionBombWarning)  # fmt: skip


class DataError(ValueError):
    """A data set that cannot be used, in one line."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split())[:300])


class BadRow(DataError):
    """A row that cannot be used; `kind` is what it is counted under."""

    def __init__(self, kind: str, message: str):
        super().__init__(f"{kind}: {message}")
        self.kind = kind


def count_skip(skipped: Counter, where: str, error: ValueError, say: bool = True) -> None:
    """Count a row under its error's kind ("refused" if the encoder raised it); name the first of a kind on stderr."""
    kind = getattr(error, "kind", "refused")
    if say and not skipped[kind]:
        print(DataError(f"{where} is skipped, {error}"), file=sys.stderr)
    skipped[kind] += 1


def to_rgb(image: Image.Image) -> Image.Image:
    image.load()
    try:
        image = ImageOps.exif_transpose(image)
    except IMAGE_ERRORS:
        pass  # broken metadata on a good picture
    if image.mode.startswith("I"):  # 16-bit grey
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8))
    return image.convert("RGB")


def read_image(source, folder: Path, read: Callable = to_rgb):
    """`read` of the image, opened but its pixels not touched; BadRow if it is broken. `source`: see the header."""
    if isinstance(source, dict):
        source = source.get("path") if source.get("bytes") is None else source["bytes"]
    try:
        if isinstance(source, Image.Image):
            return read(source)
        with Image.open(BytesIO(source) if isinstance(source, bytes) else folder / source) as image:
            return read(image)
    except IMAGE_ERRORS as error:
        where = f"{len(source)} bytes" if isinstance(source, bytes) else source
        raise BadRow("broken image", f"{where}: {error}") from error


def as_text(value, name: str) -> str:
    """A question or answer as a non-empty string: 3 and 3.0 (an int column with gaps) are "3", true is "True"."""
    if isinstance(value, (list, dict, bytes)):
        raise BadRow(f"{name} is no text", repr(value))
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = "" if value is None or value != value else str(value)  # NaN is pandas' None
    if not text.strip():
        raise BadRow(f"empty {name}", repr(value))
    return text


def as_list(value) -> list:
    """A column that should be a list; one thing is a list of it, and gaps are left out."""
    return [x for x in (value if isinstance(value, (list, tuple)) else [value]) if x is not None]


def parse(row, number: int) -> Example:
    """A dict, JSON text or one-row Arrow table, its images as they are stored; BadRow if something does not fit."""
    row = row.to_pylist()[0] if hasattr(row, "to_pylist") else row
    try:
        row = json.loads(row) if isinstance(row, str) else row
    except ValueError as error:
        raise BadRow("not JSON", f"{error}: {row}") from error
    if not isinstance(row, dict):
        raise BadRow("not a row", repr(row))
    if row.get("messages") is not None:
        turns = [
            turn if isinstance(turn, dict) else {"role": turn} for turn in as_list(row["messages"])
        ]
        if [turn.get("role") for turn in turns] != ["user", "assistant"]:
            raise BadRow(
                "messages", f"one of the user and one of the assistant are expected: {turns}"
            )
        row = {**row, "problem": turns[0].get("content"), "answer": turns[1].get("content")}
    name = "question" if row.get("problem") is None and "question" in row else "problem"
    if missing := [column for column in (name, "answer") if column not in row]:
        raise BadRow("missing column", f"{', '.join(missing)}; the row has {', '.join(row)}")
    question, answer = as_text(row[name], "question"), as_text(row["answer"], "answer")
    images, images_aug = as_list(row.get("images")), as_list(row.get("images_aug"))
    if (markers := question.count("<image>")) != len(images):
        raise BadRow("markers", f"{markers} <image> markers for {len(images)} images: {question}")
    if images_aug and len(images_aug) != len(images):
        raise BadRow("images_aug", f"{len(images_aug)} pre-masked images for {len(images)} images")
    return Example(
        question,
        answer,
        images,
        images_aug or None,
        str(number if row.get("id") is None else row["id"]),
    )


@dataclass
class Rows:
    """The usable rows of a data set. rows[i] decodes its images, and raises BadRow where only the pixels are broken."""

    name: str
    get: Callable[[int], Example]  # by the row's number in the data set
    numbers: Sequence[int]  # of the usable rows
    skipped: Counter = field(default_factory=Counter)  # kind -> rows left out by `load`

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> Example:
        return self.get(self.numbers[i])


def select(name: str, table, folder: Path, limit=None, length=None, max_prompt_tokens=None) -> Rows:
    """The usable rows of `table`, which has a len and gives what `parse` takes; the other arguments as in `load`."""

    def get(number: int) -> Example:
        example = parse(table[number], number)
        images, aug = (
            [read_image(s, folder) for s in part or ()]
            for part in (example.images, example.images_aug)
        )
        return replace(example, images=images, images_aug=aug or None)

    def check(number: int) -> None:
        example = parse(table[number], number)
        sizes = [
            read_image(s, folder, lambda image: image.size)
            for s in example.images + (example.images_aug or [])
        ]
        if thin := [f"{w} x {h}" for w, h in sizes if max(w, h) > 200 * min(w, h)]:
            raise BadRow("aspect ratio", f"an image of {thin[0]} pixels, more than 200 to 1")
        tokens = length(example.question, sizes[: len(example.images)]) if max_prompt_tokens else 0
        if max_prompt_tokens and tokens > max_prompt_tokens:
            raise BadRow(
                "overlong",
                f"{tokens} prompt tokens, more than {max_prompt_tokens}: {example.question}",
            )

    numbers, skipped = [], Counter()
    for number in range(len(table)):
        if limit and len(numbers) >= limit:
            break
        try:
            check(number)
            numbers.append(number)
        except ValueError as error:  # a BadRow, or the question is one that `length` refuses
            count_skip(
                skipped, f"{name}: row {number}", error, say=os.environ.get("RANK", "0") == "0"
            )
    if not numbers:
        counts = ", ".join(f"{kind} {n}" for kind, n in skipped.items())
        raise DataError(
            f"data {name!r}: none of its {len(table)} rows can be used ({counts or 'it is empty'})"
        )
    return Rows(name, get, numbers, skipped)


def of_split(files: list[Path], splits: tuple) -> tuple[list[Path], bool]:
    """The files of the first split that any is named after (train.json, train-00000-of-00002.parquet); else all."""
    named = {
        split: [f for f in files if re.match(rf"{re.escape(split)}[-_.]", f.name)]
        for split in splits + SPLITS
    }
    have = [split for split in named if named[split]]
    if have and have[0] not in splits:
        raise ValueError(f"no split {splits[0]!r}: choose one of {', '.join(have)}")
    return (named[have[0]], True) if have else (files, False)


def read_files(files: list[Path]):
    """The table of parquet files, mapped; of JSON lists, their rows; of other JSON files, the lines, for `parse`."""
    if files[0].suffix == ".parquet":
        import datasets  # slow to import, and needed for parquet and the hub only
        import pyarrow.parquet

        features = datasets.Features.from_arrow_schema(
            pyarrow.parquet.read_schema(files[0]).remove_metadata()
        )
        paths = [
            re.sub(r"([*?[])", r"[\1]", str(file.absolute())) for file in files
        ]  # they are taken as patterns
        return datasets.load_dataset(
            "parquet", data_files=paths, split="train", features=features
        ).with_format("arrow")
    rows = []
    for file in files:
        text = file.read_text(encoding="utf-8-sig")
        lines = [
            line for line in text.split("\n") if line.strip()
        ]  # splitlines() would also split at U+2028
        rows += json.loads(text) if text.lstrip().startswith("[") else lines
    return rows


def read_hub(spec: str, splits: tuple):
    """The table of the first of `splits` that the hub's data set has."""
    import datasets
    from huggingface_hub import HfApi, constants, hf_hub_download

    if not constants.HF_HUB_OFFLINE:  # offline, `datasets` looks into its cache
        HfApi().dataset_info(
            spec, timeout=20
        )  # fails at once where `datasets` would try for minutes
    try:
        tables = datasets.load_dataset(spec)
    except Exception as error:  # as the released loader does, whatever it is
        names = [Path(name) for name in HfApi().list_repo_files(spec, repo_type="dataset")]
        names, _ = of_split(
            [n for n in names if n.suffix == ".parquet" and str(n.parent) in (".", "data")], splits
        )
        if not names:
            raise
        print(
            DataError(f"data {spec!r}: its parquet files are read directly ({error})"),
            file=sys.stderr,
        )
        return read_files(
            [Path(hf_hub_download(spec, str(name), repo_type="dataset")) for name in names]
        )
    if not (found := [split for split in splits if split in tables]):
        raise ValueError(f"no split {splits[0]!r}: choose one of {', '.join(tables)}")
    return tables[found[0]].with_format("arrow")


def find(spec: str, splits: tuple, apart: bool = False) -> dict:
    """Name -> (table, folder of relative image paths). `apart`: files not named after splits are a set each."""
    path = Path(spec).expanduser()
    if path.is_file() and path.suffix not in SUFFIXES:
        raise DataError(
            f"data {spec!r}: unknown extension {path.suffix!r}: choose one of {', '.join(SUFFIXES)}"
        )
    # JSON beside parquet describes it
    places = [
        (folder, kinds)
        for kinds in (SUFFIXES[:1], SUFFIXES[1:])
        for folder in (path, path / "data")
    ]
    found = (
        sorted(file for file in folder.glob("*") if file.suffix in kinds)
        for folder, kinds in places
    )
    files = [path] if path.is_file() else next(filter(None, found), [])
    if not files and (
        path.exists() or path.suffix in SUFFIXES or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", spec)
    ):
        choices = f"'toy', a {', '.join(SUFFIXES)} file, a folder of such, or a hub id (owner/name)"
        raise DataError(f"data {spec!r}: no such file or folder: choose {choices}")
    try:
        if not files:
            return {path.name: (read_hub(spec, splits), Path())}
        if path.is_dir():
            files, named = of_split(files, splits)
            apart = apart and not named
        name = path.stem if path.is_file() else path.resolve().name
        parts = {file.stem: [file] for file in files} if apart else {name: files}
        return {name: (read_files(part), part[0].parent) for name, part in parts.items()}
    except (
        Exception
    ) as error:  # datasets', pyarrow's, the hub client's: their classes differ by version
        what = (
            "cannot be read"
            if files
            else "is no file or folder here, and cannot be had from the hub"
        )
        raise DataError(f"data {spec!r} {what}: {type(error).__name__}: {error}") from error


def load(spec, split="train", *, seed=0, limit=None, length=None, max_prompt_tokens=None) -> Rows:
    """The usable rows of a data set. DataError, in one line, if there is none, or no such file, split or hub id.

    `spec`: "toy" or "toy:grid=4,..." (toy.setting_of; drawn from `seed`), a file (one split, whatever `split` says), a
    folder of files, or a hub id. `limit`: the first so many usable rows (0, None: all; of the toy, 4,096 or 256).
    `length(question, [(width, height), ...])` -> tokens: rows with more than `max_prompt_tokens` are left out; the
    toy's prompts are short, and not measured.
    """
    if setting := toy.setting_of(spec):
        if split not in toy.SPLITS:
            raise DataError(
                f"the toy has no split {split!r}: choose one of {', '.join(toy.SPLITS)}"
            )
        numbers = range(limit or (4096 if split == "train" else 256))
        return Rows(f"toy/{split}", lambda i: toy.example(split, i, seed, setting), numbers)
    [(table, folder)] = find(spec, (split,)).values()
    return select(spec, table, folder, limit, length, max_prompt_tokens)


@lru_cache(maxsize=4)
def shuffled(n: int, seed: int, epoch: int) -> list[int]:
    order = list(range(n))
    random.Random(f"{seed} {epoch}").shuffle(order)
    return order


class Stream:
    """One rank's share of an endless shuffled stream of prompts: next(stream) -> [(index in the round, encoded), ...].

    The round is positions `position` to `position + prompts_per_round - 1` of all epochs' permutations laid end to end;
    this rank takes every world-th. Prompts that turn out broken, or that `encode` refuses with a ValueError, are left
    out and counted in `skipped`. While the caller works on a round the next one is loaded, so two are in memory.
    `position` counts the prompts that next() has passed, on all ranks: a checkpoint saves it. Without close() the
    interpreter finishes the round under way before it exits.
    """

    def __init__(
        self, rows, encode, prompts_per_round, rank=0, world=1, seed=0, position=0, workers=4
    ):
        assert len(rows) and prompts_per_round > 0 and 0 <= rank < world, (
            len(rows),
            prompts_per_round,
            rank,
            world,
        )
        self.rows, self.encode, self.prompts_per_round = rows, encode, prompts_per_round
        self.rank, self.world, self.seed, self.position = rank, world, seed, position
        self.skipped, self._failures = Counter(), 0  # kind -> prompts left out; how many in a row
        self._pool = ThreadPoolExecutor(workers)
        self.close = weakref.finalize(self, self._pool.shutdown, wait=False, cancel_futures=True)
        self._share = self._start(position)

    @property
    def epoch(self) -> float:
        return self.position / len(self.rows)

    def _start(self, position: int) -> list[tuple[int, int, Future]]:
        """Begin this rank's share of the round at `position`: (index in the round, row, its future)."""
        rows, encode, share = (
            self.rows,
            self.encode,
            [],
        )  # a task that held the stream would keep it alive
        for i in range(self.rank, self.prompts_per_round, self.world):
            epoch, offset = divmod(position + i, len(rows))
            row = shuffled(len(rows), self.seed, epoch)[offset]
            share.append((i, row, self._pool.submit(lambda row=row: encode(rows[row]))))
        return share

    def __next__(self) -> list[tuple[int, object]]:
        share, after = self._share, self.position + self.prompts_per_round
        self._share = self._start(after)
        prompts = []
        for i, row, future in share:
            try:
                prompts.append((i, future.result()))
                self._failures = 0
            except ValueError as error:
                count_skip(self.skipped, f"{self.rows.name}: row {self.rows.numbers[row]}", error)
                self._failures += 1
                if self._failures >= GIVE_UP:
                    raise DataError(
                        f"{self.rows.name}: {GIVE_UP} prompts in a row cannot be used, {error}"
                    ) from error
        self.position = after
        return prompts
