"""Ways to damage a file, all from one `random.Random`: bytes, JSON values, safetensors headers, lines, compressed content."""

import gzip
import json
import os

ODD = [
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**63,
    10**30,
    1.5,
    -0.0,
    1e308,
    "",
    "full",
    "L1H1",
    "é\x00",
    [],
    {},
    [[]],
    [[0]],
    {"a": 1},
]
ODD += [[1] * 50, "1e400", "../../etc/passwd", "x" * 3000, float("nan"), float("inf"), [None, "a", 2.5]]
HEADERS = ["F32", "F64", "BF16", "I64", "BOOL", "U8", "F8_E4M3", "F4", "X"]
HEADERS += [[0], [2**62, 0], [0, 2**63], [-1], [1, 1], [0, 4], [4, 0], [0, 2**64 - 1]]  # type: ignore[list-item]
SIZES = [0, 1, 7, 2**31, 2**62, 2**64 - 1]
DEEP = 100_000


def flip(rng, data):
    """Flip bits, cut, repeat, insert or overwrite a few bytes."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        place = rng.randrange(len(data) + 1)
        kind = rng.choice(["flip", "flip", "flip", "cut", "drop", "insert", "repeat", "size", "swap"])
        if kind == "flip" and place < len(data):
            data[place] ^= 1 << rng.randrange(8)
        elif kind == "cut":
            del data[place:]
        elif kind == "drop":
            del data[place : place + rng.randrange(1, 9)]
        elif kind == "insert":
            data[place:place] = rng.randbytes(rng.randrange(1, 9))
        elif kind == "repeat":
            data[place:place] = data[place : place + 32]
        elif kind == "size":
            data[:8] = rng.choice([*SIZES, len(data)]).to_bytes(8, "little")
        elif kind == "swap":
            data[place : place + 8], data[-8:] = data[-8:], data[place : place + 8]
    return bytes(data)


def places(value):
    """Every (container, key) inside a JSON value."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(pairs):
        yield value, key
        yield from places(item)


def damage_value(rng, document, odd):
    """Replace, remove, rename, swap or nest a few entries anywhere in a JSON document."""
    for _ in range(rng.choice([1, 1, 2, 4])):
        options = list(places(document))
        if not options:
            return
        parent, key = rng.choice(options)
        kind = rng.choice(["replace", "replace", "replace", "remove", "rename", "nest", "swap"])
        if kind == "replace":
            parent[key] = json.loads(json.dumps(rng.choice(odd)))
        elif kind == "remove":
            parent.pop(key)
        elif kind == "rename" and isinstance(parent, dict):
            parent[rng.choice(["x", "", "headwise", "schema", "kind"])] = parent.pop(key)
        elif kind == "nest":
            parent[key] = [parent[key]]
        elif kind == "swap":
            other = rng.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
            parent[key], parent[other] = parent[other], parent[key]


def json_value(rng, data):
    """The same document with other values; now and then with a key that stands twice, or nested too deeply."""
    document = json.loads(data)
    damage_value(rng, document, ODD)
    text = json.dumps(document)
    if rng.random() < 0.05 and text.startswith("{") and len(text) > 2:
        key = json.dumps(rng.choice(list(document))) if document else '"x"'
        text = rng.choice(
            ["{" + key + ": 0, " + text[1:], "{" + key + ": " + "[" * DEEP + "]" * DEEP + ", " + text[1:]]
        )
    return text.encode()


def header(rng, data):
    """Damage the structure of a safetensors header, or the JSON texts in its metadata."""
    size = int.from_bytes(data[:8], "little")
    found = json.loads(data[8 : 8 + size])
    texts = found.get("__metadata__") or {}
    if rng.random() < 0.5 or set(texts) <= {"headwise"}:
        damage_value(rng, found, ODD + HEADERS)
    else:
        values = {key: _loaded(value) for key, value in texts.items()}
        damage_value(rng, values, ODD)
        found["__metadata__"] = {
            key: value if key == "headwise" else json.dumps(value) for key, value in values.items()
        }
    text = json.dumps(found).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def numbers(rng, data):
    """Another number in the place of one, in the tensors of a safetensors file: NaN, infinity, a huge or a negative one."""
    size = int.from_bytes(data[:8], "little")
    body = bytearray(data)
    for _ in range(rng.choice([1, 4])):
        place = 8 + size + 4 * rng.randrange(max(1, (len(data) - 8 - size) // 4))
        body[place : place + 4] = rng.choice(
            [b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff\xff\x7f\xff", b"\xff" * 4, b"\0" * 4]
        )
    return bytes(body[: len(data)])


def lines(rng, data):
    """Damage one line of a text file: its JSON, or its cells; or drop, double and swap lines."""
    found = data.split(b"\n")
    place = rng.randrange(len(found))
    kind = rng.choice(["value", "value", "drop", "double", "swap", "cell", "deep"])
    if kind == "value":
        try:
            found[place] = json_value(rng, found[place])
        except ValueError:
            found[place] = json.dumps(rng.choice(ODD)).encode()
    elif kind == "drop":
        del found[place]
    elif kind == "double":
        found.insert(place, found[place])
    elif kind == "swap":
        found[place], found[0] = found[0], found[place]
    elif kind == "cell":
        cells = found[place].split() or [b""]
        cells[rng.randrange(len(cells))] = rng.choice([b"nan", b"inf", b"1e999", b"x", b"-1", b"", b"\xff"])
        found[place] = b"\t".join(cells)
    else:
        found[place] = b"[" * DEEP
    return b"\n".join(found)


def packed(rng, data):
    """Damage what a gzip file holds, and pack it again."""
    plain = gzip.decompress(data)
    return gzip.compress(rng.choice([lines, flip])(rng, plain), 1)


def footer(rng, data):
    """Flip bits and change numbers in a Parquet file's description of itself: its last bytes, before their length and the magic word."""
    size = min(int.from_bytes(data[-8:-4], "little"), len(data) - 8)
    body = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4])):
        place = len(data) - 8 - size + rng.randrange(size)
        body[place] = rng.choice([body[place] ^ 1 << rng.randrange(8), 0, 1, 0x7F, 0x80, 0xFF])
    return bytes(body)


def columns(rng, data):
    """The same Parquet rows with a column gone, renamed, twice, of another type, or without values."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(pa.BufferReader(data))
    odd = [None, 1.5, b"\xff", {"a": 1}, [[]], True]
    wrong = pa.array([rng.choice(odd)] * len(table))
    kinds = {
        "gone": lambda: table.drop_columns(["text"]),
        "renamed": lambda: table.rename_columns(["Text", "id", "tags"]),
        "twice": lambda: table.rename_columns(["text", "text", "tags"]),
        "other type": lambda: table.set_column(0, "text", wrong),
        "no rows": lambda: table.slice(0, 0),
        "holes": lambda: table.set_column(0, "text", pa.array(["a", None] * 3)),
        "not UTF-8": lambda: table.set_column(0, "text", pa.array([b"\xff"] * 6).view(pa.string())),
    }
    sink = pa.BufferOutputStream()
    pq.write_table(kinds[rng.choice(list(kinds))](), sink)
    return sink.getvalue().to_pybytes()


BY_SUFFIX = {
    ".safetensors": (flip, header, numbers),
    ".json": (flip, json_value),
    ".jsonl": (flip, lines),
    ".tsv": (flip, lines),
    ".gz": (flip, packed),
    ".parquet": (flip, footer, columns),
}


def damages(path):
    """The damages that fit a file of this name."""
    return BY_SUFFIX.get(path.suffix, (flip,))


def _loaded(text):
    try:
        return json.loads(text)
    except ValueError:
        return text


WHOLE = {
    "empty": b"",
    "zeros": b"\0" * 8,
    "ones": b"\xff" * 64,
    "an empty object": b"{}",
    "lists begun": b"[[",
    "a huge header": (2**40).to_bytes(8, "little") + b"{}",
    "an empty header": b"\x02" + b"\0" * 7 + b"{}",
    "deep lists": b"[" * DEEP,
    "deep objects": b'{"a":' * DEEP,
    "a long number": b'{"x": ' + b"9" * 100_000 + b"}",
    "NaN": b'{"x": NaN}',
    "utf-16": '{"x": 1}'.encode("utf-16"),
    "one long line": b'{"text": "' + b"x" * 2**20 + b'"}',
}


def whole_files(path, huge):
    """Put something else in the place of a file, time after time: other contents, nothing, a folder, a pipe, a sparse giant.

    Yields the name of each; the place is empty at the end.
    """
    for name, data in WHOLE.items():
        path.write_bytes(data)
        yield name
    with open(path, "wb") as file:
        file.truncate(huge)  # sparse: takes no room
    yield "sparse giant"
    path.unlink()
    yield "missing"
    path.mkdir()
    yield "folder"
    path.rmdir()
    if hasattr(os, "mkfifo"):
        os.mkfifo(path)
        yield "pipe"
        path.unlink()
    path.symlink_to(path.name)
    yield "link to itself"
    path.unlink()
