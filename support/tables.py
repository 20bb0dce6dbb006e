"""Where rows lie: files, folders, the hub, and the paper's nine benchmarks.

A table is a list of located rows, (rows of a file, index, folder), where the folder is what the
row's image paths are relative to. Files are read one by one, so parts of a table may type a column
differently: nulls in one, images in another.

A benchmark is a table of sharegpt rows, NAME.json, and the images it names, beside it or in
NAME_images.zip. All nine are in one data set on the hub, which PAPO-Eval reads too.
"""

from __future__ import annotations

import glob
import itertools
import json
import re
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

SUFFIXES = (".json", ".jsonl", ".parquet")
SPLITS = ("test", "validation", "val", "train")  # in the order in which evaluation prefers them
LFS_POINTER = b"version https://git-lfs"

HUB = "PAPO-Galaxy/PAPO_eval"
GENERAL = ("hiyouga_geometry3k", "AI4Math_MathVista", "We_Math", "PAPO_MMK12", "AI4Math_MathVerse")
VISION = (
    "lscpku_LogicVista",
    "BUAADreamer_clevr_count_70k",
    "MMMU_MMMU_Pro",
    "AI4Math_MathVerse_vision_dependent",
)
BENCHMARKS = {"all": GENERAL + VISION, "general": GENERAL, "vision_dependent": VISION}
ALIASES = {  # what their files may be called instead
    "We-Math_We-Math": "We_Math",
    "PAPO_MMK12_test": "PAPO_MMK12",
    "AI4Math_MathVerse-vision-dependent": "AI4Math_MathVerse_vision_dependent",
}


class DataError(ValueError):
    """A data set that cannot be used. The message is a single line."""

    def __init__(self, message: str):
        super().__init__(one_line(message))


class BadRowError(DataError):
    """A row that cannot be used. `kind` is the reason it is counted under."""

    def __init__(self, kind: str, message: str):
        super().__init__(f"{kind}: {message}")
        self.kind = kind


def one_line(message: str) -> str:
    return " ".join(message.split())[:300]


# ------------------------------------------------------------------------------------------- files


def read_files(files: list[Path], folder=None) -> list[tuple]:
    """The located rows of files. folder: of their images, if it is not each file's own."""
    located = []
    for file in files:
        with naming(file):
            rows = read_parquet(file) if file.suffix == ".parquet" else read_json(file)
        located += [(rows, index, folder or file.parent) for index in range(len(rows))]
    return located


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """Whatever is wrong with a file, such as a missing end, is a DataError that names it."""
    try:
        with open(file, "rb") as opened:
            if opened.read(len(LFS_POINTER)) == LFS_POINTER:
                raise ValueError("a Git LFS pointer; `git lfs pull` fetches the content")
        yield
    except Exception as error:  # zipfile, json, pyarrow and datasets have classes of their own
        cause = error
        while cause.__cause__:
            cause = cause.__cause__
        problem = f"{file} cannot be read: {type(cause).__name__}: {cause}"
        if isinstance(cause, OSError) and cause.filename not in (None, str(file)):
            problem += "; the cache, HF_HOME, must be a folder that can be written"
        raise DataError(problem) from error


def read_json(file: Path) -> list:
    """The rows of a list, or lines of JSON, which are parsed one by one.

    datasets would refuse the whole file for one broken line.
    """
    text = file.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        return json.loads(text)
    # splitlines() would also split at U+2028, which JSON allows within a string.
    return [line for line in text.split("\n") if line.strip()]


def read_parquet(file: Path):
    """The rows, memory-mapped, with columns typed as Arrow has them.

    datasets would type them by the file's metadata, and fails on types that its version lacks, such
    as "List" before 4. It would decode images, too, whose headers are enough at first.
    """
    import datasets  # slow to import, and only needed for parquet and the hub
    import pyarrow.parquet

    if pyarrow.parquet.read_metadata(file).num_rows == 0:
        return []  # which datasets refuses
    schema = pyarrow.parquet.read_schema(file).remove_metadata()
    features = datasets.Features.from_arrow_schema(schema)
    pattern = glob.escape(str(file.absolute()))
    return datasets.Dataset.from_parquet(pattern, features=features).with_format("arrow")


def as_dict(row) -> dict:
    """A row as a new dict. Tables hand out dicts, lines of JSON, or Arrow tables of one row."""
    if hasattr(row, "to_pylist"):
        [row] = row.to_pylist()
    if isinstance(row, str):
        try:
            row = json.loads(row)
        except ValueError as error:
            raise BadRowError("not JSON", f"{error}: {row}") from error
    if not isinstance(row, dict):
        raise BadRowError("not a row", repr(row))
    return dict(row)


# ------------------------------------------------------------------------------ folders and the hub


def open_sets(spec: str, splits: tuple, set_per_table: bool = False) -> dict[str, list[tuple]]:
    """Set name -> its located rows, of the first of `splits` there is. DataError if unreadable.

    A folder is one set. With `set_per_table` each of its tables is one, unless some are splits.
    """
    path = Path(spec).expanduser()
    if path.is_file() and path.suffix not in SUFFIXES:
        choices = f"choose one of {', '.join(SUFFIXES)}"
        raise DataError(f"data {spec!r}: unknown extension {path.suffix!r}: {choices}")
    if path.is_file():
        return {path.stem: read_files([path])}
    name, tables = path.resolve().name, folder_tables(path)
    if not tables:
        return {name: open_hub(spec, splits)}
    named = {split: tables[split] for split in SPLITS if split in tables}
    if named:
        tables = {name: choose_split(spec, named, splits)}
    elif not set_per_table:
        tables = {name: sorted(itertools.chain.from_iterable(tables.values()))}
    return {name: read_files(files) for name, files in tables.items()}


def folder_tables(path: Path) -> dict[str, list[Path]]:
    """Table name -> its files, in a folder, its data/, or imagefolder's train/ and test/."""
    for suffixes in ((".parquet",), (".json", ".jsonl")):  # JSON beside parquet files is metadata
        for folders in ([path], [path / "data"], [path / split for split in SPLITS]):
            found = itertools.chain.from_iterable(folder.glob("*") for folder in folders)
            files = sorted(file for file in found if file.suffix in suffixes)
            if files:
                return by_table(files, path)
    return {}


def by_table(files: list[Path], root: Path) -> dict[str, list[Path]]:
    """Table name -> its files. Named after a split are train-00000-of-00002.parquet, train_1.json
    and train/metadata.jsonl."""
    tables = {}
    for file in files:
        path = file.relative_to(root).as_posix().removeprefix("data/")
        split = re.match(rf"({'|'.join(SPLITS)})[-_./]", path)
        stem = re.sub(r"-\d+-of-\d+$", "", file.stem)
        name = split[1] if split else ALIASES.get(stem, stem)
        tables.setdefault(name, []).append(file)
    return tables


def choose_split(spec: str, parts: dict, splits: tuple):
    """The part of the first of `splits` there is."""
    for split in splits:
        if split in parts:
            return parts[split]
    choices = ", ".join(parts)
    raise DataError(f"data {spec!r}: no split {splits[0]!r}: choose one of {choices}")


def open_hub(spec: str, splits: tuple) -> list[tuple]:
    """The located rows of the first of `splits` in a data set on the hub."""
    path = Path(spec).expanduser()
    if path.exists() or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", spec) or path.suffix in SUFFIXES:
        choices = f"'toy', a {', '.join(SUFFIXES)} file, a folder of such, or a hub id (owner/name)"
        raise DataError(f"data {spec!r}: no such file or folder: choose {choices}")
    import datasets
    from huggingface_hub import HfApi, constants

    try:
        if not constants.HF_HUB_OFFLINE:  # offline, datasets uses its cache
            # Without a connection this fails at once; datasets would retry for minutes.
            HfApi().dataset_info(spec, timeout=20)
        tables = datasets.load_dataset(spec)
    except Exception as error:  # whatever the error is, like the released loader
        folder = download(spec, [f"*{suffix}" for suffix in SUFFIXES])
        if not folder_tables(folder):
            raise DataError(f"data {spec!r} cannot be loaded from the hub: {error}") from error
        print(one_line(f"data {spec!r}: its files are read directly ({error})"), file=sys.stderr)
        [located] = open_sets(str(folder), splits).values()
        return located
    rows = choose_split(spec, tables, splits).with_format("arrow")
    return [(rows, index, Path()) for index in range(len(rows))]


def download(repo: str, patterns: list[str]) -> Path:
    """The folder of a data set in the hub's cache, with its files of these patterns."""
    from huggingface_hub import snapshot_download

    options = {"repo_type": "dataset", "allow_patterns": patterns, "etag_timeout": 20}
    try:
        return Path(snapshot_download(repo, **options))
    except Exception as error:  # the hub client's classes differ by version
        problem = "is not a file or folder here, and cannot be loaded from the hub"
        raise DataError(f"data {repo!r} {problem}: {type(error).__name__}: {error}") from error


# ----------------------------------------------------------------------------------- the benchmarks


def benchmark_names(spec: str) -> tuple[str, ...]:
    """The benchmarks meant by "all", a group's or a benchmark's name, or those a folder holds."""
    if spec in BENCHMARKS:
        return BENCHMARKS[spec]
    name = ALIASES.get(spec, spec)
    if name in BENCHMARKS["all"]:
        return (name,)
    return tuple(benchmark_tables(Path(spec).expanduser()))


def open_benchmarks(spec: str, names: tuple, source: str) -> dict[str, list[tuple]]:
    """Benchmark -> its located rows, from `spec` if that is a folder, else from a folder or hub id.

    DataError if one is missing.
    """
    is_folder = spec not in BENCHMARKS and Path(spec).expanduser().is_dir()
    source = spec if is_folder else source
    root = Path(source).expanduser()
    if not root.is_dir():
        endings = (*SUFFIXES, "-*-of-*", "_images.zip")
        stems = itertools.chain.from_iterable(map(file_stems, names))
        root = download(source, [f"*{stem}{ending}" for stem in stems for ending in endings])
    tables, located = benchmark_tables(root), {}
    for name in names:
        if name not in tables:
            expected = f"its {name}.json is expected there or one folder below"
            raise DataError(f"no benchmark {name} in {source}: {expected}")
        located[name] = read_files(tables[name], BenchmarkImages(name, root))
    return located


def file_stems(name: str) -> list[str]:
    """The names that a benchmark's files may have."""
    return [name, *(alias for alias, benchmark in ALIASES.items() if benchmark == name)]


def benchmark_tables(root: Path) -> dict[str, list[Path]]:
    """Benchmark -> its files, in a folder or one level below: PAPO-Eval has them in papo/."""
    tables = {}
    for folder in with_subfolders(root):
        for suffix in SUFFIXES:
            tables = by_table(sorted(folder.glob(f"*{suffix}")), folder) | tables
    return {name: tables[name] for name in BENCHMARKS["all"] if name in tables}


def with_subfolders(root: Path) -> list[Path]:
    return [root, *sorted(path for path in root.glob("*") if path.is_dir())]


class BenchmarkImages:
    """Stands in for the folder that a benchmark's image paths are relative to.

    Images lie in a folder or in NAME_images.zip, which is read in place: nothing is unpacked, so
    nothing can land outside a folder or be left incomplete.
    """

    def __init__(self, name: str, root: Path):
        self.folders = with_subfolders(root)
        self.members: dict[tuple, zipfile.Path] = {}
        for folder, stem in itertools.product(self.folders, file_stems(name)):
            file = folder / f"{stem}_images.zip"
            if file.is_file():
                with naming(file):
                    archive = zipfile.ZipFile(file)
                for member in archive.namelist():
                    self.members.setdefault(member_key(member), zipfile.Path(archive, member))

    def joinpath(self, path: str) -> Path | zipfile.Path:
        """An image's file, which does not exist if there is none."""
        files = [folder / path for folder in self.folders if (folder / path).is_file()]
        return files[0] if files else self.members.get(member_key(path), self.folders[0] / path)


def member_key(path: str) -> tuple[str, ...]:
    """A path without images/, where PAPO-Eval unpacks, and without NAME_images/, whose name differs
    between tables and zips."""
    parts = PurePosixPath(path.replace("\\", "/")).parts
    if parts[:1] == ("images",):
        parts = parts[1:]
    return parts[1:] if parts and parts[0].endswith("_images") else parts
