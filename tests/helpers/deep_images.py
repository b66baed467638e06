"""Pictures with 16 bits a channel in colour, which Pillow reads and does not write."""

import struct
import zlib


def save_png16(values, path, exif=None):
    """Write uint16 [H, W, C] as PNG: grey with alpha, RGB or RGBA for 2, 3 or 4 channels."""
    height, width, channels = values.shape

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    if exif is not None:
        chunks.insert(1, chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    return path


def save_tiff16(values, path, order="<", deflate=False):
    """Write uint16 [H, W, 3] as TIFF in the byte order ``<`` or ``>``."""
    height, width, _ = values.shape
    data = values.astype(f"{order}u2").tobytes()
    data = zlib.compress(data) if deflate else data
    bits = struct.pack(f"{order}3H", 16, 16, 16)
    tags = [(256, width), (257, height), (258, None), (259, 8 if deflate else 1), (262, 2), (273, None), (277, 3)]
    tags += [(278, height), (279, len(data)), (284, 1)]
    start = 8 + 2 + 12 * len(tags) + 4
    offsets = {258: start, 273: start + len(bits)}
    fields = [
        struct.pack(f"{order}HHII", tag, 3 if tag == 258 else 4, 3 if tag == 258 else 1, offsets.get(tag, value))
        for tag, value in tags
    ]
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HIH", 42, 8, len(tags))
    path.write_bytes(head + b"".join(fields) + struct.pack(f"{order}I", 0) + bits + data)
    return path
