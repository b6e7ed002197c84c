"""A TrueType font in which every character is the same block: what is laid out with it looks the same on every machine."""

import struct

EM, ADVANCE, HEIGHT = 1000, 550, 700
FIRST, LAST = 0x20, 0x2BFF
SPACES = {0x20, 0xA0, 0x2009, 0x200B}


def _glyph(left, bottom, right, top):
    """One rectangle."""
    header = struct.pack(">5h", 1, left, bottom, right, top) + struct.pack(">2H", 3, 0)
    flags = bytes([1] * 4)
    xs = struct.pack(">4h", left, 0, right - left, 0)
    ys = struct.pack(">4h", bottom, top - bottom, 0, bottom - top)
    return header + flags + xs + ys


def _cmap():
    """Format 4, one segment whose characters each name their glyph: 1 is empty, 2 the block."""
    glyphs = [1 if c in SPACES else 2 for c in range(FIRST, LAST + 1)]
    body = struct.pack(">4H", 4, 4, 1, 0)  # two segments: searchRange 4, entrySelector 1, rangeShift 0
    body += struct.pack(">2H", LAST, 0xFFFF) + struct.pack(">H", 0) + struct.pack(">2H", FIRST, 0xFFFF)
    body += struct.pack(">2H", 0, 1) + struct.pack(">2H", 4, 0) + struct.pack(f">{len(glyphs)}H", *glyphs)
    table = struct.pack(">3H", 4, len(body) + 6, 0) + body
    return struct.pack(">2H", 0, 1) + struct.pack(">2HI", 3, 1, 12) + table


def _name(text):
    value = text.encode("utf-16-be")
    ids = [1, 2, 4, 6]
    records = b"".join(struct.pack(">6H", 3, 1, 0x409, k, len(value), 0) for k in ids)
    return struct.pack(">3H", 0, len(ids), 6 + len(records)) + records + value


def font():
    """The font's bytes."""
    block = _glyph(30, 0, ADVANCE - 30, HEIGHT)
    block += bytes(-len(block) % 4)
    places = [0, len(block), len(block), 2 * len(block)]
    ascent, descent = 900, -200
    os2 = struct.pack(">HhHHH", 4, ADVANCE, 400, 5, 0) + struct.pack(">11h", *[0] * 11) + bytes(10)
    os2 += struct.pack(">4I", 1, 0, 0, 0) + b"NONE" + struct.pack(">3H", 0x40, FIRST, LAST)
    os2 += struct.pack(">3h2H", ascent, descent, 0, ascent, -descent) + struct.pack(">2I", 1, 0)
    os2 += struct.pack(">2h3H", HEIGHT, HEIGHT, 0, 0x20, 1)
    tables = {
        "OS/2": os2,
        "cmap": _cmap(),
        "glyf": block + block,
        "head": struct.pack(">4I2H2Q4h2H3h", 0x10000, 0x10000, 0, 0x5F0F3CF5, 3, EM, 0, 0,
                            30, 0, ADVANCE - 30, HEIGHT, 0, 8, 2, 1, 0),
        "hhea": struct.pack(">I3hH11hH", 0x10000, ascent, descent, 0, ADVANCE, 30, 30, ADVANCE - 30, 1, 0, 0, 0, 0, 0, 0, 0, 3),
        "hmtx": struct.pack(">6H", ADVANCE, 30, ADVANCE, 0, ADVANCE, 30),
        "loca": struct.pack(">4I", *places),
        "maxp": struct.pack(">I14H", 0x10000, 3, 4, 1, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0),
        "name": _name("Blocks"),
        "post": struct.pack(">2I2h5I", 0x30000, 0, -100, 50, 1, 0, 0, 0, 0),
    }
    checksum = lambda data: sum(struct.unpack(f">{len(data) // 4}I", data)) & 0xFFFFFFFF
    pad = lambda data: data + bytes(-len(data) % 4)
    at = 12 + 16 * len(tables)
    head, body = struct.pack(">I4H", 0x10000, len(tables), 128, 3, 16 * len(tables) - 128), b""
    for tag, data in sorted(tables.items()):
        head += struct.pack(">4s3I", tag.encode(), checksum(pad(data)), at + len(body), len(data))
        body += pad(data)
    return head + body
