"""What kind of picture some bytes are: by the bytes, never by a name or a header that came with them."""

SIGNATURES: tuple[tuple[int, bytes, str], ...] = (
    (0, b"\xff\xd8\xff", "image/jpeg"),
    (0, b"\x89PNG\r\n\x1a\n", "image/png"),
    (0, b"GIF87a", "image/gif"),
    (0, b"GIF89a", "image/gif"),
    (8, b"WEBP", "image/webp"),
    (0, b"BM", "image/bmp"),
    (0, b"II*\x00", "image/tiff"),
    (0, b"MM\x00*", "image/tiff"),
    (4, b"ftypavif", "image/avif"),
    (4, b"ftypavis", "image/avif"),
    (4, b"ftypheic", "image/heic"),
    (4, b"ftypheix", "image/heic"),
    (4, b"ftypmif1", "image/heif"),
    (0, b"\x00\x00\x00\x0cjP  \r\n\x87\n", "image/jp2"),
    (0, b"\x00\x00\x01\x00", "image/x-icon"),
)
"""(offset, bytes there, media type)."""

SHOWN = frozenset({"image/jpeg", "image/png", "image/gif", "image/webp", "image/bmp", "image/avif"})
"""What every browser shows as a picture and none runs as a page."""


def media_type(data: bytes) -> str | None:
    """The media type of a picture, or None for bytes that begin like no picture we know."""
    for offset, signature, name in SIGNATURES:
        if data[offset : offset + len(signature)] == signature:
            return name if name != "image/webp" or data[:4] == b"RIFF" else None
    return None
