"""Where rows lie: files, folders, the hub, and the paper's nine benchmarks.

A table is a list of located rows, (rows of a file, index, folder), where the folder is what the
row's image paths are relative to. Files are read one by one, so parts of a table may type a column
differently: nulls in one, images in another.

A benchmark is a table of sharegpt rows, NAME.json, and the images it names, beside it or in
NAME_images.zip. All nine are in one data set on the hub, which PAPO-Eval reads too; its authors
have removed the free-form questions.
"""

from __future__ import annotations

import glob
import itertools
import json
import re
import zipfile
from contextlib import suppress
from pathlib import Path

SUFFIXES = (".json", ".jsonl", ".parquet")
SPLITS = ("test", "validation", "val", "train")  # in the order in which evaluation prefers them

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


class BadRowError(ValueError):
    """A row that cannot be used. `kind` is the reason it is counted under."""

    def __init__(self, kind: str, message: str):
        super().__init__(one_line(f"{kind}: {message}"))
        self.kind = kind


def one_line(message: str) -> str:
    return " ".join(message.split())[:300]


# ------------------------------------------------------------------------------------------- files


def read_files(files: list[Path], folder=None) -> list[tuple]:
    """The located rows of files. folder: of their images, if it is not each file's own.

    Whatever is wrong with a file, such as a missing end, is a ValueError that names it.
    """
    located = []
    for file in files:
        try:
            rows = read_parquet(file) if file.suffix == ".parquet" else read_json(file)
        except Exception as error:  # json, pyarrow and datasets have classes of their own
            cause = error.__cause__ or error
            problem = f"{file} cannot be read: {type(cause).__name__}: {cause}"
            if isinstance(cause, OSError) and cause.filename not in (None, str(file)):
                problem += "; the cache, HF_HOME, must be a folder that can be written"
            raise ValueError(one_line(problem)) from error
        located += [(rows, index, folder or file.parent) for index in range(len(rows))]
    return located


def read_json(file: Path) -> list:
    """The rows of a list, or of lines, of JSON. A broken line stays text.

    datasets would refuse the whole file for one broken line.
    """
    if file.suffix not in SUFFIXES:
        raise ValueError(f"unknown extension: choose one of {', '.join(SUFFIXES)}")
    text = file.read_text(encoding="utf-8-sig")
    if text.startswith("version https://git-lfs"):
        raise ValueError("a Git LFS pointer: `git lfs pull` fetches the content")
    if text.lstrip().startswith("["):
        return json.loads(text)
    # splitlines() would also split at U+2028, which JSON allows within a string.
    rows = [line for line in text.split("\n") if line.strip()]
    for number, line in enumerate(rows):
        with suppress(ValueError):
            rows[number] = json.loads(line)
    return rows


def read_parquet(file: Path):
    """The rows, memory-mapped, with columns typed as Arrow has them.

    By the file's metadata datasets would decode images, whose headers are enough at first, and it
    fails on types that its version lacks, such as "List" before 4.
    """
    import datasets  # slow to import, and only needed for parquet
    import pyarrow.parquet

    metadata = pyarrow.parquet.read_metadata(file)
    if not metadata.num_rows:  # which datasets refuses
        return []
    schema = metadata.schema.to_arrow_schema().remove_metadata()
    features = datasets.Features.from_arrow_schema(schema)
    pattern = glob.escape(str(file.absolute()))
    return datasets.Dataset.from_parquet(pattern, features=features)


# ------------------------------------------------------------------------------ folders and the hub


def open_sets(spec: str, training: bool = False) -> dict[str, list[tuple]]:
    """Set name -> its located rows, of a file, a folder or a hub id. ValueError if unreadable.

    Of splits one is read: train, or else the first of SPLITS. Where a folder has none, each of its
    tables is an evaluation set, and all of them together are the training set.
    """
    path = Path(spec).expanduser()
    if path.is_file():
        return {path.stem: read_files([path])}
    folder, name = path if path.is_dir() else download(spec), path.resolve().name
    tables = folder_tables(folder)
    splits = [split for split in SPLITS if split in tables]
    if splits:
        split = "train" if training else splits[0]
        if split not in splits:
            raise ValueError(f"data {spec!r}: no split {split!r}, it has {', '.join(splits)}")
        tables = {name: tables[split]}
    elif training and tables:
        tables = {name: sorted(itertools.chain.from_iterable(tables.values()))}
    if not tables:
        raise ValueError(f"data {spec!r}: no file of {', '.join(SUFFIXES)} in {folder}")
    return {name: read_files(files) for name, files in tables.items()}


def download(spec: str, patterns: list[str] | None = None) -> Path:
    """The folder of a hub id in the hub's cache, with its files, or those of these patterns."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(spec, repo_type="dataset", allow_patterns=patterns))
    except Exception as error:  # the hub client's classes differ by version
        choices = f"toy, a file of {', '.join(SUFFIXES)}, a folder of such, or a hub id"
        problem = f"data {spec!r} is none of {choices}: {type(error).__name__}: {error}"
        raise ValueError(one_line(problem)) from error


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
        name = split[1] if split else re.sub(r"-\d+-of-\d+$", "", file.stem)
        tables.setdefault(name, []).append(file)
    return tables


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

    ValueError if one is missing.
    """
    root = next(filter(Path.is_dir, (Path(each).expanduser() for each in (spec, source))), None)
    if root is None:
        stems = itertools.chain.from_iterable(map(file_stems, names))
        root = download(source, [f"*{stem}*" for stem in stems])
    tables, located = benchmark_tables(root), {}
    for name in names:
        if name not in tables:
            expected = f"its {name}.json is expected there or one folder below"
            raise ValueError(f"no benchmark {name} in {root}: {expected}")
        located[name] = read_files([tables[name]], BenchmarkImages(name, root))
    return located


def benchmark_tables(root: Path) -> dict[str, Path]:
    """Benchmark -> its table, in a folder or one level below: PAPO-Eval has them in papo/."""
    found = {name: benchmark_files(root, name, ".json*") for name in BENCHMARKS["all"]}
    return {name: files[0] for name, files in found.items() if files}


def benchmark_files(root: Path, name: str, ending: str) -> list[Path]:
    stems = itertools.product(("", "*/"), file_stems(name))
    return [file for folder, stem in stems for file in sorted(root.glob(f"{folder}{stem}{ending}"))]


def file_stems(name: str) -> list[str]:
    """The names that a benchmark's files may have."""
    return [name, *(alias for alias, benchmark in ALIASES.items() if benchmark == name)]


class BenchmarkImages:
    """Stands in for the folder that a benchmark's image paths are relative to.

    Images lie in a folder or in NAME_images.zip, which is read in place: nothing is unpacked, so
    nothing can land outside a folder or be left incomplete.
    """

    def __init__(self, name: str, root: Path):
        self.folders = [root, *sorted(root.glob("*/"))]
        self.members: dict[str, zipfile.Path] = {}
        for file in benchmark_files(root, name, "_images.zip"):
            try:
                archive = zipfile.ZipFile(file)
            except (zipfile.BadZipFile, OSError) as error:
                raise ValueError(f"{file} cannot be read: {error}") from error
            for member in archive.namelist():
                self.members.setdefault(member_key(member), zipfile.Path(archive, member))

    def joinpath(self, path: str) -> Path | zipfile.Path:
        """An image's file, which does not exist if there is none."""
        files = [folder / path for folder in self.folders]
        return next(filter(Path.is_file, files), self.members.get(member_key(path), files[0]))


def member_key(path: str) -> str:
    """A path without NAME_images/, whose name differs between tables and zips, and without images/,
    which PAPO-Eval unpacks to."""
    return re.sub(r"^(\./)?(images/)?([^/]*_images/)?", "", path)
