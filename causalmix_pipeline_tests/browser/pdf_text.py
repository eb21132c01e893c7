"""The text of a PDF that Chromium printed: enough of the format to read it back."""

import re
import zlib
from pathlib import Path


def pdf_pages(path: Path) -> list[str]:
    """The text of each page, without spaces: where words end is drawn, not written."""
    raw = path.read_bytes()
    objects = {int(n): body for n, body in re.findall(rb"(\d+) 0 obj(.*?)endobj", raw, re.DOTALL)}
    pages = [body for body in objects.values() if re.search(rb"/Type\s*/Page\b", body)]
    return [_page_text(page, objects) for page in pages]


def _page_text(page: bytes, objects: dict[int, bytes]) -> str:
    letters_of = {
        name: _letters(objects, int(n)) for name, n in re.findall(rb"/(F\d+) (\d+) 0 R", page)
    }
    content = re.search(rb"/Contents (\d+)", page)
    assert content is not None, page
    text, letters = "", {}
    drawn = re.findall(rb"/(F\d+) [\d.]+ Tf|<([0-9A-Fa-f]+)>", _stream(objects[int(content[1])]))
    for font, codes in drawn:
        letters = letters_of[font] if font else letters
        code = codes.decode()
        text += "".join(letters.get(int(code[i : i + 4], 16), "") for i in range(0, len(code), 4))
    return text.replace(" ", "")


def _letters(objects: dict[int, bytes], font: int) -> dict[int, str]:
    """What each glyph of a font stands for."""
    known = re.search(rb"/ToUnicode (\d+)", objects[font])
    if known is None:
        return {}
    table, letters = _stream(objects[int(known[1])]).decode("latin-1"), {}
    for block in re.findall(r"beginbfchar(.*?)endbfchar", table, re.DOTALL):
        for code, letter in re.findall(r"<(\w+)>\s*<(\w+)>", block):
            letters[int(code, 16)] = bytes.fromhex(letter).decode("utf-16-be")
    for block in re.findall(r"beginbfrange(.*?)endbfrange", table, re.DOTALL):
        for first, last, letter in re.findall(r"<(\w+)>\s*<(\w+)>\s*<(\w+)>", block):
            for step, code in enumerate(range(int(first, 16), int(last, 16) + 1)):
                letters[code] = chr(int(letter, 16) + step)
    return letters


def _stream(body: bytes) -> bytes:
    data = body.split(b"stream", 1)[1].rsplit(b"endstream", 1)[0].lstrip(b"\r\n")
    return zlib.decompressobj().decompress(data) if b"FlateDecode" in body else data
