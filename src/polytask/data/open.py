"""Opens what a `DataSpec` names: a file, a folder, a hub data set, an embedded one."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from polytask.data.rows import RowSource, StreamSource
from polytask.data.spec import DataSpec
from polytask.data.textfile import plain_suffix
from polytask.errors import ConfigError, DataError, nearest, suggestion

Source = RowSource | StreamSource
Splits = dict[str, Source]

WHOLE = "all"
"""Name of the one part of data that come without splits."""

FORMATS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("valid", "validation", "val", "dev", "development"), "valid"),
    **dict.fromkeys(("test", "testing"), "test"),
}


def open_rows(spec: DataSpec, base: Path) -> Source:
    """The rows of one split, or of data without splits. Relative paths start at `base`.

    `DataError` names what is missing and the nearest there is; data with several splits must say
    which one (`split`).
    """
    splits = open_splits(spec, base)
    if len(splits) == 1:
        return next(iter(splits.values()))
    raise DataError(
        f"{spec.name} has the splits {', '.join(splits)}; say which one, for instance "
        f"split: {next(iter(splits))}"
    )


def open_splits(spec: DataSpec, base: Path) -> Splits:
    """Rows by split ('train', 'valid', 'test' under their usual other names too); {'all': rows}
    where the data has no splits, or `spec.split` picks one."""
    if spec.embedded is not None:
        from polytask.data import embedded

        _refuse_unused(spec, "embedded data", ())
        splits: Splits = dict(embedded.load(spec.embedded))
    elif spec.hub is not None:
        from polytask.data.hub import read_hub

        _refuse_unused(spec, "hub data", ())
        splits = read_hub(spec.hub, spec.split, spec.streaming, spec.max_bad)
    else:
        splits = _open_path(spec, base)
    if spec.split is not None:
        splits = {WHOLE: _picked(splits, spec.split, spec.name)}
    return {SPLIT_NAMES.get(name, name): _in_shape(source, spec) for name, source in splits.items()}


def _in_shape(source: Source, spec: DataSpec) -> Source:
    """Gathered into series, or read in order, if the spec says so."""
    if isinstance(source, RowSource) and spec.series is not None:
        from polytask.data.series import series_rows

        return series_rows(source, spec.series, spec.max_bad)
    if isinstance(source, RowSource) and spec.streaming:
        from polytask.data.stream import StreamOf

        return StreamOf(source)
    return source


def _picked(splits: Splits, split: str, name: str) -> Source:
    if split in splits:
        return splits[split]
    for other, source in splits.items():
        if split in SPLIT_NAMES and SPLIT_NAMES.get(other) == SPLIT_NAMES[split]:
            return source
    raise DataError(f"{name} has no split '{split}'.{suggestion(split, splits)}")


def _open_path(spec: DataSpec, base: Path) -> Splits:
    assert spec.path is not None
    path = (base / Path(spec.path).expanduser()).absolute()
    if path.is_dir():
        return _open_folder(path, spec)
    if path.is_file():
        return {WHOLE: _finished(_open_file(path, spec), path.parent, spec)}
    if any(sign in spec.path for sign in "*?["):
        files = sorted(
            file
            for file in Path(path.anchor).glob(str(path.relative_to(path.anchor)))
            if file.is_file()
        )
        if files:
            return _by_split(files, path.parent, spec)
        raise DataError(f"no file matches {path}")
    raise missing_file(path)


def missing_file(path: Path) -> DataError:
    """The error for a path that is not there; it names the nearest that is."""
    folder = path.parent
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    wanted = path.relative_to(folder).parts[0]
    if folder != path.parent:
        near = nearest(wanted, [name for name in names if (folder / name).is_dir()])
        hint = f" Did you mean '{folder / near}'?" if near else f" {folder} has no '{wanted}'."
        return DataError(f"there is no folder {path.parent}.{hint}")
    near = nearest(wanted, names)
    hint = f" Did you mean '{near}'?" if near else _listing(folder, names)
    return DataError(f"there is no file {path}.{hint}")


def _listing(folder: Path, names: list[str]) -> str:
    shown = ", ".join(name for name in names if not name.startswith("."))
    return f" {folder} has: {shown[:300] or 'nothing'}."


def _open_file(path: Path, spec: DataSpec) -> Source:
    kind = spec.format or FORMATS.get(plain_suffix(path))
    if kind is None or kind == "images":
        raise DataError(
            f"the format of {path} cannot be told from its name; known endings: "
            f"{', '.join(FORMATS)}. Say format: csv, tsv, jsonl or parquet"
        )
    _refuse_unused(spec, str(path), _USED[kind])
    if kind in ("csv", "tsv"):
        return _open_delimited(path, spec, "\t" if kind == "tsv" else None)
    if kind == "jsonl":
        from polytask.data.jsonl import read_jsonl, stream_jsonl
        from polytask.data.textfile import text_file

        file = text_file(path, spec.encoding)
        reader = stream_jsonl if spec.streaming else read_jsonl
        return reader(file, spec.max_bad)
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty")
    if kind == "parquet":
        from polytask.data.parquet import read_parquet, stream_parquet

        return (stream_parquet if spec.streaming else read_parquet)(path, spec.max_bad)
    from polytask.data.arrow import ArrowRows

    return ArrowRows.open(path, spec.max_bad)


_CSV_ONLY = ("separator", "quote", "encoding", "columns", "types")
_USED: dict[str, tuple[str, ...]] = {
    "csv": _CSV_ONLY,
    "tsv": _CSV_ONLY,
    "jsonl": ("encoding",),
    "parquet": (),
    "arrow": (),
}


def _refuse_unused(spec: DataSpec, what: str, used: tuple[str, ...]) -> None:
    """`ConfigError` for an option that would have no effect on this kind of data."""
    fields = type(spec).model_fields
    for name in _CSV_ONLY:
        value = getattr(spec, name)
        if name == "types":
            value = {column: kind for column, kind in value.items() if kind != "image"}
        default = {} if name == "types" else fields[name].default
        if name not in used and value != default:
            raise ConfigError(f"{what}: the option '{name}' has no effect here; leave it out")


def _open_delimited(path: Path, spec: DataSpec, separator: str | None) -> Source:
    from polytask.data.csvrows import read_csv, stream_csv
    from polytask.data.delimited import Delimited

    source = Delimited.open(
        path,
        separator=spec.separator or separator,
        quote=spec.quote,
        encoding=spec.encoding,
        columns=spec.columns,
        types=spec.types,
    )
    return (stream_csv if spec.streaming else read_csv)(source, spec.max_bad)


def _finished(source: Source, root: Path, spec: DataSpec) -> Source:
    """Image paths resolved and checked."""
    from polytask.data.columns import require_columns
    from polytask.data.imagefolder import image_columns

    declared = [name for name, kind in spec.types.items() if kind == "image"]
    require_columns(source, declared, f"{spec.name}: types")
    names = tuple(dict.fromkeys([*declared, *image_columns(source, root)]))
    return _with_images(source, names, root, spec) if names else source


def _open_folder(folder: Path, spec: DataSpec) -> Splits:
    if is_saved(folder):
        from polytask.data.hub import read_saved

        return read_saved(folder, spec.max_bad)
    files = data_files(folder)
    if spec.table is not None or spec.format == "images":
        return _open_images(folder, files, spec)
    from polytask.data.imagefolder import image_files

    if next(image_files(folder), None) is not None:
        return _open_images(folder, files, spec)
    if files:
        return _by_split(files, folder, spec)
    names = sorted(p.name for p in folder.iterdir())
    raise DataError(f"{folder} has no data that can be read.{_listing(folder, names)}")


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` of Hugging Face datasets wrote the folder."""
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return True
    return (folder / "dataset_info.json").is_file() and any(folder.glob("data-*.arrow"))


def data_files(folder: Path) -> list[Path]:
    """Files below a folder whose ending says that they hold rows; hidden ones left out."""
    return sorted(
        file
        for file in folder.rglob("*")
        if plain_suffix(file) in FORMATS
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )


def split_of(path: Path, folder: Path) -> str | None:
    """The split that a file's name or folder names: 'train-00000-of-00002.parquet',
    'reviews_test.csv'."""
    *folders, name = path.relative_to(folder).parts
    stem = name.split(".")[0].replace("-", "_").split("_")
    words = [stem[0], stem[-1], *folders]
    return next((SPLIT_NAMES[w.lower()] for w in words if w.lower() in SPLIT_NAMES), None)


def _by_split(files: list[Path], folder: Path, spec: DataSpec) -> Splits:
    """Files that form one data set, joined per split that their names name."""
    grouped: dict[str, list[Path]] = {}
    for file in files:
        grouped.setdefault(split_of(file, folder) or WHOLE, []).append(file)
    if WHOLE in grouped and len(grouped) > 1:
        grouped = {WHOLE: files}
    if spec.split is not None:
        names = [name for name in grouped if SPLIT_NAMES.get(spec.split, spec.split) == name]
        grouped = {name: grouped[name] for name in names} or grouped
    return {name: _joined(parts, spec) for name, parts in grouped.items()}


def _joined(files: list[Path], spec: DataSpec) -> Source:
    from polytask.data.concat import concat

    parts = [_finished(_open_file(file, spec), file.parent, spec) for file in files]
    for file, part in zip(files, parts):
        other = set(part.columns) ^ set(parts[0].columns)
        if other and FORMATS.get(plain_suffix(file)) != "jsonl":  # JSON may leave keys out
            raise DataError(
                f"{files[0].name} and {file.name} have different columns "
                f"({', '.join(sorted(other))} only in one of them), so they are not one data set. "
                f"Name the one you mean: path: {file}"
            )
    return concat(parts, files[0].parent.name)


def _open_images(folder: Path, files: Iterable[Path], spec: DataSpec) -> Splits:
    from polytask.data.imagefolder import class_folder

    decode = spec.check_images == "decode"
    table = _table_of(folder, list(files), spec)
    if table is not None:
        return {WHOLE: _image_table(table, folder, spec)}
    parts = {p.name: p for p in sorted(folder.iterdir()) if p.is_dir()}
    splits = {name: p for name, p in parts.items() if name.lower() in SPLIT_NAMES}
    if splits and len(splits) == len(parts):
        if spec.split is not None:
            splits = {n: p for n, p in splits.items() if _same_split(n, spec.split)} or splits
        return {
            SPLIT_NAMES[name.lower()]: class_folder(p, spec.label_column, spec.max_bad, decode)
            for name, p in splits.items()
        }
    return {WHOLE: class_folder(folder, spec.label_column, spec.max_bad, decode)}


def _same_split(name: str, wanted: str) -> bool:
    return SPLIT_NAMES[name.lower()] == SPLIT_NAMES.get(wanted.lower(), wanted)


def _table_of(folder: Path, files: list[Path], spec: DataSpec) -> Path | None:
    """The table that belongs to the images: as said, or the only one at the folder's top."""
    if spec.table is not None:
        table = folder / spec.table
        if not table.is_file():
            raise missing_file(table)
        return table
    top = [file for file in files if file.parent == folder]
    return top[0] if len(top) == 1 else None


def _image_table(table: Path, folder: Path, spec: DataSpec) -> Source:
    from polytask.data.columns import require_columns
    from polytask.data.imagefolder import image_columns

    format_of_table = None if spec.format == "images" else spec.format
    source = _open_file(table, spec.model_copy(update={"format": format_of_table}))
    if spec.image_column is not None:
        require_columns(source, [spec.image_column], f"{table}: image_column")
        names: tuple[str, ...] = (spec.image_column,)
    else:
        names = image_columns(source, folder)
    if not names:
        raise DataError(
            f"no column of {table} holds paths of images below {folder} "
            f"(has: {', '.join(source.columns)}). Say which with image_column"
        )
    return _with_images(source, names, folder, spec)


def _with_images(source: Source, names: tuple[str, ...], root: Path, spec: DataSpec) -> Source:
    from polytask.data.imagefolder import ImageStream, with_images

    if isinstance(source, RowSource):
        return with_images(source, names, root, spec.max_bad, spec.check_images == "decode")
    return ImageStream(source, names, root)
