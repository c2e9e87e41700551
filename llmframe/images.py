"""Images, sound and files of a row, as content parts of its message.

Pure but for the reading of files; nothing is fetched. A key has the digest of the bytes (of the pixels, for a picture
in memory), so that a file may move, and no release of an encoder changes a key. What is sent is written when it is
sent, so that memory follows what is in flight.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd

from llmframe.errors import ConfigurationError, TemplateError
from llmframe.messages import Message, Messages, kind, well_formed

EXTRA = "pip install 'llmframe-pandas[images]'"
MOST_BYTES = 50 << 20  # of one file: what OpenAI takes in a whole request, and no other endpoint more
JPEG_QUALITY = 95  # of a photograph that is written anew: no eye tells it from the original, a tenth of a PNG's size
DOCUMENT = "document.pdf"  # the API wants a name; a file's own would make another request of a renamed file

Kind = Literal["image", "audio", "file"]

_STARTS: tuple[tuple[bytes, str], ...] = (
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF87a", "image/gif"),
    (b"GIF89a", "image/gif"),
    (b"BM", "image/bmp"),
    (b"II*\x00", "image/tiff"),
    (b"MM\x00*", "image/tiff"),
    (b"%PDF-", "application/pdf"),
    (b"ID3", "audio/mpeg"),
    (b"\xff\xfb", "audio/mpeg"),
    (b"\xff\xf3", "audio/mpeg"),
    (b"\xff\xf2", "audio/mpeg"),
)
_RIFF = {b"WEBP": "image/webp", b"WAVE": "audio/wav"}
_FTYP = {
    b"avif": "image/avif",
    b"avis": "image/avif",
    b"heic": "image/heic",
    b"heix": "image/heic",
    b"mif1": "image/heif",
}
_FORMATS = {"audio/wav": "wav", "audio/mpeg": "mp3"}
_WRITABLE = ("1", "L", "LA", "RGB", "RGBA", "I;16")  # PIL's modes that a PNG holds as they are


class CannotRead(Exception):
    """What a cell names cannot be read, or is nothing that a model takes: that row's error."""


@dataclass(frozen=True, slots=True)
class Attachment:
    """One thing beside a row's text.

    Attributes
    ----------
    kind : {"image", "audio", "file"}
        As what it is sent.
    media_type : str
        Of its bytes; empty for a URL.
    name : str
        What stands for it in a key: a URL as it is, or the digest of what it holds.
    content : callable or None
        Gives its bytes; None for a URL.
    from_file : bool
        Whether it may be another one when it is read again.
    """

    kind: Kind
    media_type: str
    name: str
    content: Callable[[], bytes] | None = field(default=None, repr=False)
    from_file: bool = False

    def part(self) -> Message:
        """Give the content part that is sent, in the chat API's form."""
        if self.content is None:
            return self._holding(self.name)
        text = base64.b64encode(self.content()).decode()
        return self._holding(text if self.kind == "audio" else f"data:{self.media_type};base64,{text}")

    def named(self) -> Message:
        """Give the same part as a key has it."""
        return self._holding(self.name)

    def _holding(self, data: str) -> Message:
        if self.kind == "image":
            return {"type": "image_url", "image_url": {"url": data}}
        if self.kind == "audio":
            return {"type": "input_audio", "input_audio": {"data": data, "format": _FORMATS[self.media_type]}}
        return {"type": "file", "file": {"filename": DOCUMENT, "file_data": data}}


def attachments_of(value: Any, column: object) -> Iterator[Attachment]:
    """Read what a cell holds: one thing, or a list of them.

    Parameters
    ----------
    value : str, path, bytes, PIL image, numpy array, dict with ``bytes`` or ``path``, or a list of these
        An ``http(s)://`` or ``data:`` URL goes as it is; any other text is a path.
    column : object
        The column's name, for the errors.

    Raises
    ------
    CannotRead
        A file that is not there, or whose bytes are nothing that a model takes.
    TemplateError
        A value of a type that is none of these.
    """
    if isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.ndim and value.dtype.kind in "OUS"):
        for each in value:
            if each is None or (pd.api.types.is_scalar(each) and pd.isna(each)):
                raise CannotRead(f"a list in column {column!r} has a missing value")
            yield _attachment(each, column)
    else:
        yield _attachment(value, column)


def attach(messages: Messages, parts: Sequence[Message]) -> Messages:
    """Put parts behind the text of the last user turn; one is made where there is none.

    Examples
    --------
    >>> attach([{"role": "user", "content": "See:"}], [{"type": "image_url", "image_url": {"url": "http://a/b"}}])[0]["content"]
    [{'type': 'text', 'text': 'See:'}, {'type': 'image_url', 'image_url': {'url': 'http://a/b'}}]
    """
    if not parts:
        return messages
    place = max((n for n, message in enumerate(messages) if message["role"] == "user"), default=None)
    if place is None:
        return [*messages, {"role": "user", "content": [*parts]}]
    content = messages[place]["content"]
    if isinstance(content, str):
        content = [{"type": "text", "text": content}] if content else []
    return [*messages[:place], {**messages[place], "content": [*content, *parts]}, *messages[place + 1 :]]


def _attachment(value: Any, column: object) -> Attachment:
    if isinstance(value, Mapping) and ("bytes" in value or "path" in value):  # as Hugging Face's data sets hold one
        value = next((held for name in ("bytes", "path") if (held := value.get(name)) is not None), "")
    if isinstance(value, str) and value.startswith(("http://", "https://", "data:")):
        return Attachment("image", "", well_formed(value))
    if isinstance(value, str | os.PathLike):
        return _of_file(value, column)
    if isinstance(value, bytes | bytearray | memoryview):
        return _of_bytes(bytes(value), f"the bytes in column {column!r}")
    if isinstance(value, np.ndarray):
        return _of_picture(_as_picture(value, column), column)
    if callable(getattr(value, "tobytes", None)) and hasattr(value, "mode"):
        return _of_picture(value, column)
    raise TemplateError(
        f"column {column!r} of images= holds a value {kind(value)}; it has to be a URL, a path, bytes, a PIL image, "
        "a numpy array, or a list of these"
    )


def _of_file(path: str | os.PathLike[Any], column: object) -> Attachment:
    name = os.fspath(path)
    what = f"the file {name!r} of column {column!r}"
    if not name:
        raise CannotRead(f"column {column!r} of images= holds an empty text in place of a path")
    if isinstance(name, str) and "://" in name:
        raise CannotRead(f"{what} is a URL that no endpoint fetches; fetch it first, and give its path or its bytes")
    try:
        if os.path.getsize(path) > MOST_BYTES:
            raise CannotRead(f"{what} has {os.path.getsize(path):,} bytes, and a request takes {MOST_BYTES:,} at most")
        with open(path, "rb") as file:
            content = file.read()
    except (OSError, ValueError) as error:  # a null byte in a name is the latter
        reason = getattr(error, "strerror", None) or str(error)
        raise CannotRead(well_formed(f"{what} cannot be read: {reason}")) from error
    return _of_bytes(content, what, from_file=True)


def _of_bytes(content: bytes, what: str, *, from_file: bool = False) -> Attachment:
    media_type = _media_type(content)
    if media_type is None:
        state = "empty" if not content else "no picture, sound or document that is known"
        raise CannotRead(
            well_formed(f"{what}: it is {state} (PNG, JPEG, GIF, WebP, BMP, TIFF, HEIC, AVIF, PDF, WAV or MP3)")
        )
    if len(content) > MOST_BYTES:
        raise CannotRead(f"{what}: it has {len(content):,} bytes, and a request takes {MOST_BYTES:,} at most")
    sort = media_type.partition("/")[0]
    as_what: Kind = "image" if sort == "image" else "audio" if sort == "audio" else "file"
    return Attachment(as_what, media_type, f"sha256:{hashlib.sha256(content).hexdigest()}", lambda: content, from_file)


def _media_type(content: bytes) -> str | None:
    """Tell what bytes are by how they begin: a file's name says what somebody thought it was."""
    if content[:4] == b"RIFF":
        return _RIFF.get(content[8:12])
    if content[4:8] == b"ftyp":
        return _FTYP.get(content[8:12])
    return next((media_type for start, media_type in _STARTS if content.startswith(start)), None)


def _as_picture(array: Any, column: object) -> Any:
    """Make a PIL image of an array of pixels."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ConfigurationError(f"an array in images= is sent as a PNG, which takes Pillow: {EXTRA}") from error
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))) or 0 in array.shape:
        raise TemplateError(
            f"column {column!r} of images= holds an array of shape {array.shape}; a picture is (height, width) or "
            "(height, width, 3 or 4)"
        )
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    elif array.dtype.kind == "f" and bool(((array >= 0) & (array <= 1)).all()):
        array = np.rint(array * 255).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise TemplateError(
            f"column {column!r} of images= holds an array of {array.dtype}; a picture is of uint8, or of floats from "
            "0 to 1"
        )
    return Image.fromarray(np.ascontiguousarray(array))


def _of_picture(picture: Any, column: object) -> Attachment:
    photograph = getattr(picture, "format", None) == "JPEG"
    try:
        if picture.mode not in _WRITABLE:  # a palette is not among its pixels
            picture = picture.convert("RGBA" if picture.mode in ("P", "PA", "RGBa", "La") else "RGB")
        pixels = picture.tobytes()
    except Exception as error:  # PIL decodes here what it was given: a torn file ends in any of a dozen types
        raise CannotRead(well_formed(f"the picture in column {column!r} cannot be read: {error}")) from error
    digest = hashlib.sha256(b"%s %d %d\n" % (picture.mode.encode(), *picture.size))
    digest.update(pixels)
    as_jpeg = photograph and picture.mode in ("L", "RGB")

    def content() -> bytes:
        file = io.BytesIO()
        if as_jpeg:
            picture.save(file, "JPEG", quality=JPEG_QUALITY)
        else:
            picture.save(file, "PNG")
        return file.getvalue()

    media_type = "image/jpeg" if as_jpeg else "image/png"
    return Attachment("image", media_type, f"sha256:{digest.hexdigest()}", content)
