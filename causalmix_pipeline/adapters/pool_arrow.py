"""Rows of Parquet and Arrow IPC files.

Parquet is decoded a few rows at a time, so memory is bounded whatever a row group's size. Arrow
IPC has no smaller unit than a record batch: memory is that of a file's largest.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import IO, TYPE_CHECKING, Any

import polars as pl

from causalmix_pipeline.adapters.pool_door import (
    ColumnMap,
    DoorRules,
    UnreadableFileError,
    bad_bytes,
    check_columns,
    conversation,
    number_of,
    offered_schema,
    readable,
    wrong_text,
)
from causalmix_pipeline.adapters.pool_files import PoolFile, as_text

if TYPE_CHECKING:
    import pyarrow as pa

#: Decoded Parquet values held at a time, by what the file says of itself.
PARQUET_BUDGET_BYTES = 256 * 2**20
#: Buffers that decompress to less than this are no bomb, however well they pack.
COMPRESSED_FLOOR_BYTES = 16 * 2**20


def read_parquet(
    file: PoolFile, columns: ColumnMap, rules: DoorRules, batch_bytes: int
) -> Iterator[pl.DataFrame]:
    """Rows of a Parquet file, in batches for the door."""
    tables = readable(_parquet_tables(file, columns, rules, batch_bytes), " as Parquet")
    yield from readable(_offer_tables(tables, columns, batch_bytes), " as Parquet")


def _parquet_tables(
    file: PoolFile, columns: ColumnMap, rules: DoorRules, batch_bytes: int
) -> Iterator[pa.Table]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with (
        file.open() as raw,
        pq.ParquetFile(
            raw,
            memory_map=False,
            pre_buffer=False,
            buffer_size=2**20,
            page_checksum_verification=True,
        ) as parquet,
    ):
        names = parquet.schema_arrow.names
        check_columns(names, columns)
        wanted = [name for name in columns.wanted if name in names]
        for group in range(parquet.metadata.num_row_groups):
            n_rows = _parquet_step(parquet.metadata.row_group(group), wanted, rules, batch_bytes)
            for batch in parquet.iter_batches(
                batch_size=n_rows, row_groups=[group], columns=wanted, use_threads=False
            ):
                yield pa.Table.from_batches([batch])


def _parquet_step(group: Any, wanted: list[str], rules: DoorRules, batch_bytes: int) -> int:
    """How many rows of a row group to decode at a time.

    A dictionary page may hold one huge value that every row repeats, so the rows must be few
    enough for each to be as long as the whole dictionary.
    """
    plain = dictionary = 0.0
    for i in range(group.num_columns):
        chunk = group.column(i)
        if chunk.path_in_schema.split(".")[0] not in wanted and chunk.path_in_schema not in wanted:
            continue
        stored, size = max(chunk.total_compressed_size, 1), max(chunk.total_uncompressed_size, 0)
        ratio = size / stored
        if ratio > rules.max_decompression_ratio and size > PARQUET_BUDGET_BYTES:
            raise OSError(
                f"column {chunk.path_in_schema!r} decompresses to {ratio:.0f} times its bytes; the "
                f"limit is {rules.max_decompression_ratio:g}"
            )
        plain += size
        if chunk.has_dictionary_page and chunk.dictionary_page_offset is not None:
            page = max(chunk.data_page_offset - chunk.dictionary_page_offset, 0)
            dictionary = max(dictionary, min(page * max(ratio, 1.0), size))
    most = min(
        batch_bytes / max(plain / max(group.num_rows, 1), 1.0),
        PARQUET_BUDGET_BYTES / max(dictionary, 1.0),
    )
    return int(min(max(most, 1), 2**14))


def read_arrow(
    file: PoolFile, columns: ColumnMap, rules: DoorRules, batch_bytes: int
) -> Iterator[pl.DataFrame]:
    """Rows of an Arrow IPC file or stream, in batches for the door."""
    tables = readable(_arrow_tables(file, columns, rules, batch_bytes), " as Arrow")
    yield from readable(_offer_tables(tables, columns, batch_bytes), " as Arrow")


def _arrow_tables(
    file: PoolFile, columns: ColumnMap, rules: DoorRules, batch_bytes: int
) -> Iterator[pa.Table]:
    import pyarrow as pa

    with file.open() as raw:
        is_stream = raw.read(6) != b"ARROW1"
        raw.seek(0)
        opened = pa.ipc.open_stream(raw) if is_stream else pa.ipc.open_file(raw)
        names = opened.schema.names
        check_columns(names, columns)
        has_end = _check_messages(raw, 0 if is_stream else 8, rules)
        wanted = [names.index(name) for name in columns.wanted if name in names]
        raw.seek(0)
        options = pa.ipc.IpcReadOptions(included_fields=wanted, use_threads=False)
        if is_stream:
            batches: Iterable = pa.ipc.open_stream(raw, options=options)
        else:
            reader = pa.ipc.open_file(raw, options=options)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        for batch in batches:
            _check_structure(batch)
            step = max(int(batch_bytes * batch.num_rows / max(batch.nbytes, 1)), 1)
            for start in range(0, batch.num_rows, step):
                yield pa.Table.from_batches([batch.slice(start, step)])
        if is_stream and not has_end:
            raise OSError("it ends without its end mark, so rows may be missing")


def _check_structure(batch: pa.RecordBatch) -> None:
    """Refuse offsets and indices that point outside their data: nothing else reads them safely."""
    import pyarrow as pa

    for column in batch.columns:
        column.validate()
        if isinstance(column, pa.ExtensionArray):
            column = column.storage
        if isinstance(column, pa.DictionaryArray):
            values = column.dictionary.cast(_with_bytes(column.dictionary.type))
            column = pa.DictionaryArray.from_arrays(column.indices, values)
        column.cast(_with_bytes(column.type)).validate(full=True)


def _with_bytes(kind: pa.DataType) -> pa.DataType:
    """The type with bytes for text, in which bytes that aren't UTF-8 are no damage."""
    import pyarrow as pa

    if pa.types.is_string(kind):
        return pa.binary()
    if pa.types.is_large_string(kind):
        return pa.large_binary()
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_with_bytes(kind.value_type)))
    if pa.types.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(_with_bytes(kind.value_type)))
    if pa.types.is_struct(kind):
        return pa.struct([f.with_type(_with_bytes(f.type)) for f in kind])
    return kind


def _check_messages(raw: IO[bytes], start: int, rules: DoorRules) -> bool:
    """Say whether a series of IPC messages has its end mark; a cut between two looks like an end.

    Only what stands around the data is read. Damage in it is left to Arrow to find.

    Source: the columnar format's specification, "Encapsulated message format" and `Message.fbs`.

    Raises:
        OSError: if a message's buffers would decompress too far.
    """
    raw.seek(start)
    while len(head := raw.read(8)) == 8:
        mark, n_bytes = struct.unpack("<II", head)
        if mark != 0xFFFFFFFF or n_bytes == 0:
            return mark == 0xFFFFFFFF
        message = _Flatbuffer(raw.read(n_bytes))
        body = raw.tell()
        try:
            kind, n_body = message.message()
            buffers = message.compressed_buffers(kind)
        except (struct.error, IndexError):
            return False
        claimed = 0
        for offset, length in buffers:
            raw.seek(body + max(offset, 0))
            prefix = raw.read(8) if length >= 8 else b""
            claimed += max(int.from_bytes(prefix, "little", signed=True), 0)
        if claimed > max(rules.max_decompression_ratio * n_body, COMPRESSED_FLOOR_BYTES):
            raise OSError(
                f"a record batch of {n_body} bytes decompresses to {claimed}; the limit is "
                f"{rules.max_decompression_ratio:g} times"
            )
        if n_body < 0:
            return False
        raw.seek(body + n_body)
    return False


class _Flatbuffer:
    """The few fields of an IPC message's metadata that tell how large its data is."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.root = 0

    def message(self) -> tuple[int, int]:
        """The kind of message, and bytes of its body; remembers where its header stands."""
        root = self._u32(0)
        kind, header, length = (self._field(root, i) for i in (1, 2, 3))
        self.root = header + self._u32(header) if header else 0
        n_body = struct.unpack_from("<q", self.data, length)[0] if length else 0
        return (self.data[kind] if kind else 0), n_body

    def compressed_buffers(self, kind: int) -> list[tuple[int, int]]:
        """Offset and length of each compressed buffer of a record batch or dictionary."""
        batch = self.root
        if kind == 2:  # a dictionary batch holds a record batch
            data = self._field(batch, 1)
            batch = data + self._u32(data)
        elif kind != 3:
            return []
        buffers = self._field(batch, 2)
        if not self._field(batch, 3) or not buffers:  # no compression
            return []
        vector = buffers + self._u32(buffers)
        count = min(self._u32(vector), len(self.data) // 16)
        return [struct.unpack_from("<qq", self.data, vector + 4 + 16 * i) for i in range(count)]

    def _u32(self, at: int) -> int:
        return struct.unpack_from("<I", self.data, at)[0]

    def _field(self, table: int, index: int) -> int:
        """Where a field of a table stands; 0 if it's left out."""
        vtable = table - struct.unpack_from("<i", self.data, table)[0]
        (size,) = struct.unpack_from("<H", self.data, vtable)
        if 4 + 2 * index >= size:
            return 0
        (offset,) = struct.unpack_from("<H", self.data, vtable + 4 + 2 * index)
        return table + offset if offset else 0


def _offer_tables(
    tables: Iterable[pa.Table], columns: ColumnMap, batch_bytes: int
) -> Iterator[pl.DataFrame]:
    """Batches of rows; those before damage come before the exception."""
    import pyarrow as pa

    held: list[pa.Table] = []
    start = 0

    def take() -> pl.DataFrame:
        nonlocal start
        offered = _offer_table(pa.concat_tables(held), columns, start)
        start += offered.height
        held.clear()
        return offered

    try:
        for table in tables:
            if table.num_rows:
                held.append(table)
            if sum(table.nbytes for table in held) >= batch_bytes:
                yield take()
    except UnreadableFileError:
        if held:
            yield take()
        raise
    if held:
        yield take()


def _offer_table(table: pa.Table, columns: ColumnMap, start: int) -> pl.DataFrame:
    """Rows of Arrow data as the door wants them."""
    rows: dict[str, Any] = {
        "row": pl.int_range(start, start + table.num_rows, eager=True),
        "refusal": pl.lit(None),
        "prompt_chars": pl.lit(0),
    }
    for role, column in columns.texts.items():
        values = table.column(column)
        if role == "messages":
            chats = [_chat(column, value) for value in values]
            rows[role] = pl.Series([None if isinstance(c, str) else c[0] for c in chats])
            rows[f"{role}!"] = pl.Series([c if isinstance(c, str) else None for c in chats])
            rows["prompt_chars"] = pl.Series([0 if isinstance(c, str) else c[1] for c in chats])
        else:
            rows[role], rows[f"{role}!"] = _text_values(column, values)
    for name in columns.numbers:
        values = table.column(name) if name in table.column_names else None
        rows[f"number {name}"], rows[f"number {name}!"] = _number_values(name, values)
    schema = offered_schema(columns)
    frame = pl.select(**{name: rows[name] for name in schema})
    return frame.cast(schema)


def _chat(column: str, value: pa.Scalar) -> tuple[str, int] | str:
    try:
        return conversation(column, value.as_py())
    except UnicodeDecodeError as error:
        return bad_bytes(column, error.start)


def _dense(values: Any) -> Any:
    """Arrow values without a dictionary or a library's own type around them."""
    import pyarrow as pa

    if isinstance(values.type, pa.BaseExtensionType):
        values = values.cast(values.type.storage_type)
    if not pa.types.is_dictionary(values.type):
        return values
    kind = values.type.value_type
    kind = pa.large_string() if pa.types.is_string_view(kind) else kind
    parts = [chunk.dictionary.cast(kind).take(chunk.indices) for chunk in values.chunks]
    return pa.chunked_array(parts, kind)


def _text_values(column: str, values: pa.ChunkedArray) -> tuple[Any, Any]:
    """Usable texts, and the reasons of the others."""
    import pyarrow as pa

    values = _dense(values)
    kind = values.type
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if not (is_text or pa.types.is_string_view(kind)):
        problem = pl.lit(wrong_text(column, _kind_name(kind)))
        present = pl.from_arrow(values.is_valid())
        return pl.lit(None), pl.when(present).then(problem)
    values = values.cast(pa.large_binary())
    texts = values.cast(pa.large_string(), safe=False)
    try:
        texts.validate(full=True)
        return pl.from_arrow(texts), pl.lit(None)
    except pa.ArrowInvalid:
        pairs = [_decoded(column, value) for value in values.to_pylist()]
        return pl.Series([p[0] for p in pairs]), pl.Series([p[1] for p in pairs])


def _decoded(column: str, value: bytes | None) -> tuple[str | None, str | None]:
    if value is None:
        return None, None
    try:
        return value.decode("utf-8"), None
    except UnicodeDecodeError as error:
        return None, bad_bytes(column, error.start)


def _number_values(name: str, values: Any) -> tuple[Any, Any]:
    """Finite numbers, null where there's none, and the reasons of what isn't a number."""
    import pyarrow as pa

    if values is None:
        return pl.lit(None), pl.lit(None)
    values = _dense(values)
    kind = values.type
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
        numbers = pl.lit(pl.from_arrow(values.cast(pa.float64(), safe=False)))
        return pl.when(numbers.is_finite()).then(numbers), pl.lit(None)
    texts, problems = _text_values(name, values)
    if isinstance(texts, pl.Series):
        pairs = [number_of(name, value) for value in texts.to_list()]
        found = pl.Series([p[1] for p in pairs], dtype=pl.String)
        return pl.Series([p[0] for p in pairs]), pl.coalesce(problems, found)
    if pa.types.is_decimal(kind):
        pairs = [number_of(name, None if v is None else float(v)) for v in values.to_pylist()]
        return pl.Series([p[0] for p in pairs], dtype=pl.Float64), pl.lit(None)
    problem = pl.lit(as_text(f"column {name!r} must be a number, got {_kind_name(kind)}"))
    return pl.lit(None), pl.when(pl.from_arrow(values.is_valid())).then(problem)


def _kind_name(kind: pa.DataType) -> str:
    """What Python would call a value, so that every reader says the same of it."""
    import pyarrow as pa

    types = pa.types
    names = {
        "bool": types.is_boolean,
        "int": types.is_integer,
        "float": types.is_floating,
        "dict": types.is_struct,
        "list": lambda k: types.is_list(k) or types.is_large_list(k) or types.is_map(k),
        "bytes": lambda k: types.is_binary(k) or types.is_large_binary(k),
    }
    return next((name for name, is_kind in names.items() if is_kind(kind)), str(kind))
