"""Rows -> examples, and the shuffled stream of them that each rank reads.

The start of the pipeline. `load` returns the usable rows of a training set: the toy, a hub id, a
parquet, JSON or JSONL file, or a folder of such files. (benchmarks.py does so for evaluation.)
`Stream` shuffles and encodes them, and splits them over the ranks.

A row has `problem` (or `question`), `answer` and `images`, and may have `images_aug` (pre-masked
images) and `id`; a variant may ask for further columns of images. A sharegpt row has `messages`
instead: the question is the user's message, the answer the assistant's. Each `<image>` marker in
the question stands for one image. An image is {bytes, path}, bytes, a path (relative to the data
file's folder) or a PIL image. Unusable rows are skipped and counted, and the first of each kind is
reported on stderr.

Differences from the released loader:
1. Broken, empty and mismatched rows are skipped; there they end the run or go unnoticed. Images
   without markers count as mismatched, because guessing where they go could change the question.
2. Prompts that are too long are found from image headers. Pixels are decoded when a row is read.
3. Both make images RGB with PIL's convert, which drops transparency. Here 16-bit grey is scaled to
   8 bits (PIL clips it), EXIF orientation is applied, and only the image processor resizes.
   (Further columns, such as images_aug, are first brought to the size of their image.)
4. A round has the same prompts on any number of ranks: the order depends on seed and epoch alone.

    python -c "from support import data; rows = data.load('toy'); print(len(rows), rows[0])"
"""

from __future__ import annotations

import glob
import itertools
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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from support import StepError, toy
from support.batch import Example

ENCODERS = 4  # threads that decode and encode images
SUFFIXES = (".parquet", ".json", ".jsonl")
SPLITS = ("test", "validation", "val", "train")  # in the order in which evaluation prefers them
TOY_TRAIN_ROWS, TOY_EVAL_ROWS = 4096, 256
MAX_ASPECT_RATIO = 200  # Qwen's image processor refuses images beyond it
MAX_CONSECUTIVE_BAD_ROWS = 64  # while streaming; then something else is wrong
# Names of further image columns: ours, then the one in TAPO's released data.
COLUMN_NAMES = {
    "images_pos": ("images_pos", "image_noisy"),
    "images_neg": ("images_neg", "image_aug"),
}

# What PIL raises on broken files, and on more than twice Image.MAX_IMAGE_PIXELS (179 megapixels).
IMAGE_ERRORS = (
    ArithmeticError,
    EOFError,
    LookupError,
    OSError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
    Image.DecompressionBombError,
)


# ------------------------------------------------------------------------------------------- errors


def one_line(message: str) -> str:
    return " ".join(message.split())[:300]


class DataError(ValueError):
    """A data set that cannot be used. The message is a single line."""

    def __init__(self, message: str):
        super().__init__(one_line(message))


class BadRowError(DataError):
    """A row that cannot be used. `kind` is the reason it is counted under."""

    def __init__(self, kind: str, message: str):
        super().__init__(f"{kind}: {message}")
        self.kind = kind


def count_skip(skipped: Counter, where: str, error: ValueError) -> str:
    """Count a skipped row by kind, or "refused" by the encoder.

    Returns a line for the first of each kind, "" for the others.
    """
    kind = getattr(error, "kind", "refused")
    skipped[kind] += 1
    return one_line(f"{where} is skipped, {error}") if skipped[kind] == 1 else ""


# ------------------------------------------------------------------------------------------- images


def read_image(source, folder: Path, read: Callable | None = None):
    """The image in RGB, or `read` of the opened image; BadRowError if it is broken.

    `source` is {bytes, path}, bytes, a path relative to `folder`, or a PIL image. PIL opens it by
    its header and decodes the pixels only when `read` asks for them.
    """
    read = read or to_rgb
    if isinstance(source, dict):
        source = source.get("path") if source.get("bytes") is None else source["bytes"]
    try:
        if isinstance(source, Image.Image):
            return read(source)
        file = BytesIO(source) if isinstance(source, bytes) else folder.joinpath(source)
        with Image.open(file) as image:
            return read(image)
    except IMAGE_ERRORS as error:
        name = f"{len(source)} bytes" if isinstance(source, bytes) else source
        raise BadRowError("broken image", f"{name}: {error}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    image.load()
    with suppress(*IMAGE_ERRORS):  # broken metadata does not make the pixels unusable
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey
        pixels = np.asarray(image).clip(0, 65535) // 256
        image = Image.fromarray(pixels.astype(np.uint8))
    return image.convert("RGB")


def image_size(source, folder: Path) -> tuple[int, int]:
    """(width, height), from the header alone."""
    return read_image(source, folder, read=lambda image: image.size)


# --------------------------------------------------------------------------------------------- rows


def parse_row(row, number: int, columns: tuple[str, ...] = ()) -> Example:
    """A row as an example, its images as they are stored. BadRowError if the row is unusable.

    columns: image columns that a row must have, if it has images at all.
    """
    row = as_dict(row)
    if row.get("messages") is not None:
        row = from_messages(row)
    question_column = "problem"
    if row.get("problem") is None and "question" in row:
        question_column = "question"
    missing = [column for column in (question_column, "answer") if column not in row]
    if missing:
        raise BadRowError("missing column", f"{', '.join(missing)}; the row has {', '.join(row)}")
    question = as_text(row[question_column], "question")
    answer = as_text(row["answer"], "answer")
    images = as_list(row.get("images"))
    markers = question.count("<image>")
    if markers != len(images):
        raise BadRowError(
            "markers", f"{markers} <image> markers for {len(images)} images: {question}"
        )
    more_images = find_more_images(row, len(images), columns)
    row_id = number if row.get("id") is None else row["id"]
    return Example(question, answer, images, str(row_id), more_images)


def find_more_images(row: dict, n_images: int, required: tuple[str, ...]) -> dict[str, list]:
    """The row's images_aug, if it has any, and its required columns. BadRowError: see parse_row."""
    found = {}
    for column in ("images_aug", *required):
        names = COLUMN_NAMES.get(column, (column,))
        images = next((as_list(row[name]) for name in names if row.get(name) is not None), [])
        if not images and column in required and n_images:
            wanted = " or ".join(names)
            raise BadRowError("missing column", f"{wanted}; the row has {', '.join(row)}")
        if images and len(images) != n_images:
            raise BadRowError(column, f"{len(images)} images in {column} for {n_images} images")
        if images:
            found[column] = images
    return found


def as_dict(row) -> dict:
    """A row as a dict. Tables hand out dicts, lines of JSON, or Arrow tables of one row."""
    if hasattr(row, "to_pylist"):
        [row] = row.to_pylist()
    if isinstance(row, str):
        try:
            row = json.loads(row)
        except ValueError as error:
            raise BadRowError("not JSON", f"{error}: {row}") from error
    if not isinstance(row, dict):
        raise BadRowError("not a row", repr(row))
    return row


def from_messages(row: dict) -> dict:
    """A sharegpt row with `problem` and `answer` from its two turns."""
    turns = as_list(row["messages"])
    roles = [isinstance(turn, dict) and turn.get("role") for turn in turns]
    if roles != ["user", "assistant"]:
        raise BadRowError("messages", f"expected the user's, then the assistant's: {turns}")
    user, assistant = turns
    return row | {"problem": user.get("content"), "answer": assistant.get("content")}


def as_text(value, name: str) -> str:
    """A question or an answer as text that is not empty. 3 and 3.0 are "3", true is "True"."""
    if isinstance(value, (list, dict, bytes)):
        raise BadRowError(f"{name} is not text", repr(value))
    if isinstance(value, float) and value.is_integer():  # an integer column with gaps
        value = int(value)
    is_missing = value is None or value != value  # pandas stores a missing value as NaN
    if is_missing or not str(value).strip():
        raise BadRowError(f"empty {name}", repr(value))
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, as "\ud83d" in JSON
        raise BadRowError(f"{name} is not valid Unicode", repr(value)) from error
    return text


def as_list(value) -> list:
    """A column that should be a list, without its gaps. A single value is a list of one."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return [value for value in values if value is not None]


# ---------------------------------------------------------------------------------- the usable rows


@dataclass
class Rows:
    """The usable rows of a data set.

    rows[i] decodes the images of an example. BadRowError if their pixels turn out broken.
    """

    name: str
    get: Callable[[int], Example]  # by the row's number in the data set
    numbers: Sequence[int]  # of the usable rows, from 0
    skipped: Counter = field(default_factory=Counter)  # kind -> rows that `load` left out

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> Example:
        return self.get(self.numbers[i])


def load(
    spec, split="train", *, seed=0, limit=None, length=None, max_prompt_tokens=None, columns=()
) -> Rows:
    """The usable rows of a training set. DataError if it cannot be read or no row is usable.

    `spec`: "toy" or "toy:grid=4,..." (see toy.setting_of; `seed` is the toy's), a file (one split,
    whatever `split` says), a folder of files, or a hub id.
    `limit`: read only this many usable rows. None and 0 mean all, or the toy's default number.
    `length(question, [(width, height), ...])` is the number of prompt tokens. Prompts longer than
    `max_prompt_tokens` are skipped. The toy's are short and not measured. `columns`: image columns
    that rows with images must have.
    """
    setting = toy.setting_of(spec)
    if setting:
        if split not in toy.SPLITS:
            choices = ", ".join(toy.SPLITS)
            raise DataError(f"the toy has no split {split!r}: choose one of {choices}")
        unknown = [column for column in columns if column not in toy.RELATIVES]
        if unknown:
            choices = ", ".join(toy.RELATIVES)
            raise DataError(f"the toy has no image column {unknown[0]!r}: choose from {choices}")
        default = TOY_TRAIN_ROWS if split == "train" else TOY_EVAL_ROWS
        numbers = range(limit or default)
        return Rows(
            f"toy/{split}", lambda i: toy.example(split, i, seed, setting, columns), numbers
        )
    name = str(spec)
    [(table, folder)] = open_tables(name, (split,)).values()
    return usable_rows(
        name,
        table,
        folder,
        limit=limit,
        length=length,
        max_prompt_tokens=max_prompt_tokens,
        columns=columns,
    )


def usable_rows(
    name: str, table, folder: Path, limit=None, length=None, max_prompt_tokens=None, columns=()
) -> Rows:
    """The usable rows of a table, which is a sequence of what `as_dict` takes. See `load`."""
    numbers, skipped, reports = [], Counter(), []
    for number in range(len(table)):
        if limit and len(numbers) >= limit:
            break
        try:
            example = parse_row(table[number], number, columns)
            check(example, folder, length, max_prompt_tokens)
            numbers.append(number)
        except ValueError as error:  # a BadRowError, or `length` refuses the question
            reports.append(count_skip(skipped, f"{name}: row {number}", error))
    reports = list(filter(None, reports))
    if not numbers:
        counts = ", ".join(f"{kind} {count}" for kind, count in skipped.items())
        problem = f"data {name!r}: none of its {len(table)} rows can be used"
        raise DataError(f"{problem} ({counts}): {reports[0]}" if reports else f"{problem}: no rows")
    if os.environ.get("RANK", "0") == "0":
        print("".join(f"{line}\n" for line in reports), end="", file=sys.stderr)

    def get(number: int) -> Example:
        return decode(parse_row(table[number], number, columns), folder)

    return Rows(name, get, numbers, skipped)


def check(example: Example, folder: Path, length: Callable | None, max_prompt_tokens) -> None:
    """Reads headers only. BadRowError if an image is broken or too thin, or the prompt too long."""
    sizes = [image_size(source, folder) for source in example.images]
    more_images = itertools.chain.from_iterable(example.more_images.values())
    more_sizes = [image_size(source, folder) for source in more_images]
    for width, height in sizes + more_sizes:
        if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
            limit = f"more than {MAX_ASPECT_RATIO} to 1"
            raise BadRowError("aspect ratio", f"an image of {width} x {height} pixels, {limit}")
    if max_prompt_tokens:
        tokens = length(example.question, sizes)
        if tokens > max_prompt_tokens:
            excess = f"{tokens} prompt tokens, more than {max_prompt_tokens}"
            raise BadRowError("overlong", f"{excess}: {example.question}")


def decode(example: Example, folder: Path) -> Example:
    """The example with its images decoded."""
    images = [read_image(source, folder) for source in example.images]
    more_images = {
        column: [read_image(source, folder) for source in sources]
        for column, sources in example.more_images.items()
    }
    return replace(example, images=images, more_images=more_images)


# -------------------------------------------------------------------------------- files and the hub


def open_tables(spec: str, splits: tuple, set_per_file: bool = False) -> dict[str, tuple]:
    """Set name -> (table, folder of its relative image paths), of the first of `splits` there is.

    DataError if `spec` cannot be read. `set_per_file`: see `group_files`.
    """
    path = Path(spec).expanduser()
    files = list_files(spec)
    try:
        if not files:
            return {path.name: (read_hub(spec, splits), Path())}
        sets = group_files(path, files, splits, set_per_file)
        return {name: (read_files(group), group[0].parent) for name, group in sets.items()}
    except Exception as error:  # datasets, pyarrow and the hub client have classes of their own
        problem = "cannot be read"
        if not files:
            problem = "is not a file or folder here, and cannot be loaded from the hub"
        raise DataError(f"data {spec!r} {problem}: {type(error).__name__}: {error}") from error


def list_files(spec: str) -> list[Path]:
    """The file `spec`, or the files in the folder `spec` or its data/; none for a hub id."""
    path = Path(spec).expanduser()
    if path.is_file():
        if path.suffix not in SUFFIXES:
            choices = ", ".join(SUFFIXES)
            raise DataError(
                f"data {spec!r}: unknown extension {path.suffix!r}: choose one of {choices}"
            )
        return [path]
    for suffixes in ((".parquet",), (".json", ".jsonl")):  # JSON beside parquet files is metadata
        for folder in (path, path / "data"):
            files = sorted(file for file in folder.glob("*") if file.suffix in suffixes)
            if files:
                return files
    is_hub_id = re.fullmatch(r"\w[\w.-]*/[\w.-]+", spec) and path.suffix not in SUFFIXES
    if path.exists() or not is_hub_id:
        choices = f"'toy', a {', '.join(SUFFIXES)} file, a folder of such, or a hub id (owner/name)"
        raise DataError(f"data {spec!r}: no such file or folder: choose {choices}")
    return []


def group_files(path: Path, files: list[Path], splits: tuple, set_per_file: bool) -> dict:
    """Set name -> its files. `path` is the file or the folder that the files come from.

    A folder is one set. With `set_per_file` each of its files is one, unless some are named after
    splits.
    """
    if path.is_file():
        return {path.stem: files}
    named = files_of_split(files, splits)
    if set_per_file and not named:
        return {file.stem: [file] for file in files}
    return {path.resolve().name: named or files}


def files_of_split(files: list[Path], splits: tuple) -> list[Path]:
    """The files named after the first of `splits` there is, such as train-00000-of-00002.parquet.

    Empty if no file is named after a split. ValueError if files are named after other splits only.
    """
    named = {}
    for split in (*splits, *SPLITS):
        matching = [file for file in files if re.match(rf"{re.escape(split)}[-_.]", file.name)]
        if matching:
            named[split] = matching
    return choose_split(named, splits) if named else []


def choose_split(parts: dict, splits: tuple):
    """The part under the first of `splits` there is."""
    for split in splits:
        if split in parts:
            return parts[split]
    raise ValueError(f"no split {splits[0]!r}: choose one of {', '.join(parts)}")


def read_files(files: list[Path]):
    """The rows of files of one kind, as `as_dict` takes them."""
    if files[0].suffix == ".parquet":
        return read_parquet(files)
    # datasets' own JSON reader would refuse a file in which 3 and "three" are both answers.
    rows = []
    for file in files:
        text = file.read_text(encoding="utf-8-sig")
        if text.lstrip().startswith("["):
            rows += json.loads(text)
        else:
            # splitlines() would also split at U+2028, which JSON allows within a string.
            rows += [line for line in text.split("\n") if line.strip()]
    return rows


def read_parquet(files: list[Path]):
    """The files as one memory-mapped table, its columns typed as Arrow has them.

    datasets would type them by the files' metadata, and fails on types that its version lacks, such
    as "List" before 4. It would decode images, too, whose headers are enough for `check`.
    """
    import datasets  # slow to import, and only needed for parquet and the hub
    import pyarrow.parquet

    schema = pyarrow.parquet.read_schema(files[0]).remove_metadata()
    features = datasets.Features.from_arrow_schema(schema)
    patterns = [glob.escape(str(file.absolute())) for file in files]
    return datasets.Dataset.from_parquet(patterns, features=features).with_format("arrow")


def read_hub(spec: str, splits: tuple):
    """The table of the first of `splits` in a data set on the hub."""
    import datasets
    from huggingface_hub import HfApi, constants, hf_hub_download

    if not constants.HF_HUB_OFFLINE:  # offline, datasets uses its cache
        # Without a connection this fails at once; datasets would retry for minutes.
        HfApi().dataset_info(spec, timeout=20)
    try:
        tables = datasets.load_dataset(spec)
    except Exception as error:  # whatever the error is, like the released loader
        listed = [Path(name) for name in HfApi().list_repo_files(spec, repo_type="dataset")]
        names = [path for path in listed if str(path.parent) in (".", "data")]
        names = [path for path in names if path.suffix == ".parquet"]
        names = files_of_split(names, splits) or names
        if not names:
            raise
        warning = f"data {spec!r}: its parquet files are read directly ({error})"
        print(one_line(warning), file=sys.stderr)
        files = [hf_hub_download(spec, str(name), repo_type="dataset") for name in names]
        return read_parquet([Path(file) for file in files])
    return choose_split(tables, splits).with_format("arrow")


# --------------------------------------------------------------------------------------- the stream


@lru_cache(maxsize=4)
def shuffled(n: int, seed: int, epoch: int) -> list[int]:
    order = list(range(n))
    random.Random(f"{seed} {epoch}").shuffle(order)
    return order


def encode_row(rows: Rows, encode: Callable, i: int):
    """A worker's task. It holds no reference to the Stream, so that a dropped Stream is freed."""
    return encode(rows[i])


class Stream:
    """A rank's share of an endless shuffled stream: next(stream) -> [(index in round, prompt)].

    The permutations of all epochs are laid end to end. A round is the next `prompts_per_round` rows
    of that sequence, and this rank takes every world-th of them. Rows whose images turn out broken,
    or that `encode` refuses with a ValueError, are left out and counted in `skipped`. While the
    caller works on a round, the next one is encoded: two rounds are in memory.

    `position` is the number of rows that next() has passed on all ranks; a checkpoint saves it.
    Without close(), the interpreter finishes the round it is encoding before it exits.

    torch's DataLoader prefetches too, but a bad row ends it, and it cannot start within an epoch.
    """

    def __init__(
        self, rows, encode, prompts_per_round, rank=0, world=1, seed=0, position=0, workers=ENCODERS
    ):
        assert len(rows) > 0 and prompts_per_round > 0, (len(rows), prompts_per_round)
        assert 0 <= rank < world, (rank, world)
        self.rows, self.encode, self.prompts_per_round = rows, encode, prompts_per_round
        self.rank, self.world, self.seed = rank, world, seed
        self.position = position
        self.skipped = Counter()  # kind -> prompts left out
        self._consecutive_bad_rows = 0
        self._pool = ThreadPoolExecutor(workers)
        self.close = weakref.finalize(self, self._pool.shutdown, wait=False, cancel_futures=True)
        self._share = self._start_round(position)

    def _start_round(self, position: int) -> list[tuple[int, int, Future]]:
        """Start encoding this rank's share: (index in the round, row, the prompt's future)."""
        share = []
        for index in range(self.rank, self.prompts_per_round, self.world):
            epoch, offset = divmod(position + index, len(self.rows))
            row = shuffled(len(self.rows), self.seed, epoch)[offset]
            future = self._pool.submit(encode_row, self.rows, self.encode, row)
            share.append((index, row, future))
        return share

    def __next__(self) -> list[tuple[int, object]]:
        share, end = self._share, self.position + self.prompts_per_round
        self._share = self._start_round(end)
        prompts = []
        for index, row, future in share:
            try:
                prompts.append((index, future.result()))
                self._consecutive_bad_rows = 0
            except ValueError as error:
                self._skip(row, error)
        self.position = end
        return prompts

    def _skip(self, row: int, error: ValueError) -> None:
        name = self.rows.name
        report = count_skip(self.skipped, f"{name}: row {self.rows.numbers[row]}", error)
        if report:
            print(report, file=sys.stderr)
        self._consecutive_bad_rows += 1
        if self._consecutive_bad_rows >= MAX_CONSECUTIVE_BAD_ROWS:
            count = self._consecutive_bad_rows
            raise StepError(f"{name}: {count} prompts in a row cannot be used, {error}") from error


def encode_ahead(rows: Rows, encode: Callable, chunks: list[list[int]]) -> Iterator[list]:
    """The prompts of each chunk of indices; the next chunk is encoded while the caller works.

    A row that turns out broken is left out, counted and named.
    """
    pool = ThreadPoolExecutor(ENCODERS)

    def start(chunk: list[int]) -> list[tuple[int, Future]]:
        return [(i, pool.submit(lambda i=i: encode(rows[i], i))) for i in chunk]

    try:
        following = start(chunks[0]) if chunks else []
        for number in range(len(chunks)):
            current, following = following, start([*chunks, []][number + 1])
            prompts = []
            for index, future in current:
                try:
                    prompts.append(future.result())
                except ValueError as error:
                    rows.skipped[getattr(error, "kind", "not encodable")] += 1
                    row = rows.numbers[index]
                    print(f"{rows.name}: row {row} is left out: {error}", file=sys.stderr)
            yield prompts
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
