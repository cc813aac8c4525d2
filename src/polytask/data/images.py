"""Images as uint8 (height, width, 3), whatever they come as."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from polytask.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

Pixels = npt.NDArray[np.uint8]
SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm"))
MAX_PIXELS = 100_000_000
"""More pixels than any photograph has: such a file is damaged or malicious."""

_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, TypeError)


def decode_image(value: Any, where: str = "image") -> Pixels:
    """Pixels (height, width, 3) uint8 of an array, encoded bytes, a path or a Pillow image.

    Grey is repeated over three channels, transparency laid over white, 16-bit scaled to 8, floats
    in 0..1 scaled to 255, the orientation of photographs applied, the first frame of an animation
    taken. `DataError` names `where` and the path when there is no image in it.
    """
    if isinstance(value, np.ndarray):
        return _from_array(value, where)
    if isinstance(value, Mapping) and {"bytes", "path"} >= value.keys():
        value = value.get("bytes") or value.get("path")
    if value is None or value == "" or value == b"":
        raise DataError(f"{where}: there is no image")
    if isinstance(value, list | tuple):
        return _from_array(_as_array(value, where), where)
    with _Opened(value, where) as opened:
        return opened.pixels()


def check_image(path: Path, decode: bool = True) -> str | None:
    """Why the file is not a usable image ('is missing'), or None. Without `decode` only its header
    is read."""
    try:
        with _Opened(path, "") as opened:
            if decode:
                opened.load_quickly()
    except DataError as error:
        return str(error).removeprefix(f": image {path} ")
    return None


class _Opened:
    """A Pillow image whose every failure becomes a `DataError` that names it."""

    def __init__(self, value: Any, where: str) -> None:
        self._value, self._where = value, where
        self._name = f" {value}" if isinstance(value, str | Path) else ""

    def __enter__(self) -> _Opened:
        from PIL import Image

        value = self._value
        if isinstance(value, Image.Image):
            self.image: Image.Image = value
            return self
        if isinstance(value, bytes | bytearray | memoryview):
            source: Any = io.BytesIO(value)
        elif isinstance(value, str | Path):
            if str(value).startswith(("http://", "https://")):
                raise self._fault("is an address; download it first")
            if not Path(value).is_file():
                raise self._fault("is missing")
            source = value
        else:
            raise self._fault(f"is a {type(value).__name__}, not an image")
        try:
            self.image = Image.open(source)
        except Image.DecompressionBombError as error:
            raise self._bomb() from error
        except _DAMAGED as error:
            raise self._fault(f"cannot be decoded: {error}") from error
        if self.image.width * self.image.height > MAX_PIXELS:
            self.image.close()
            raise self._bomb()
        return self

    def __exit__(self, *_: object) -> None:
        if self.image is not self._value:
            self.image.close()

    def load_quickly(self) -> None:
        """Decode all data; JPEG at an eighth of the size, which still reads every byte."""
        try:
            self.image.draft("RGB", (max(self.image.width // 8, 1), max(self.image.height // 8, 1)))
            self.image.load()
        except _DAMAGED as error:
            raise self._fault(f"cannot be decoded: {error}") from error

    def pixels(self) -> Pixels:
        from PIL import ImageOps

        try:
            image = ImageOps.exif_transpose(self.image)
            if image.mode.startswith(("I", "F")):
                return _from_array(_to_unit(np.asarray(image), image.mode), self._where)
            return np.array(_over_white(image), dtype=np.uint8)
        except _DAMAGED as error:
            raise self._fault(f"cannot be decoded: {error}") from error

    def _fault(self, reason: str) -> DataError:
        return DataError(f"{self._where}: image{self._name} {reason}")

    def _bomb(self) -> DataError:
        return self._fault(f"has more than {MAX_PIXELS // 1_000_000} million pixels")


def _over_white(image: Image.Image) -> Image.Image:
    """RGB, with whatever is transparent replaced by white in proportion."""
    from PIL import Image

    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _to_unit(values: npt.NDArray[Any], mode: str) -> npt.NDArray[Any]:
    """16-bit integers as uint16; floats as they are."""
    if mode.startswith("F"):
        return values
    if values.size and (values.min() < 0 or values.max() > 65535):
        raise ValueError("pixels are beyond 16 bits")
    return values.astype(np.uint16)


def _as_array(value: Any, where: str) -> npt.NDArray[Any]:
    try:
        return np.asarray(value)
    except ValueError as error:
        raise DataError(f"{where}: the image's rows differ in length") from error


def _from_array(array: npt.NDArray[Any], where: str) -> Pixels:
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 2, 3, 4) or 0 in array.shape:
        raise DataError(
            f"{where}: an image array should be (height, width), or (height, width, channels) "
            f"with 1 to 4 channels, not {array.shape}"
        )
    pixels = _eight_bits(array, where)
    if pixels.shape[2] in (2, 4):
        alpha = pixels[:, :, -1:].astype(np.uint32)
        colour = pixels[:, :, :-1].astype(np.uint32) * alpha + 255 * (255 - alpha)
        pixels = ((colour + 127) // 255).astype(np.uint8)
    if pixels.shape[2] == 1:
        pixels = np.repeat(pixels, 3, axis=2)
    return np.ascontiguousarray(pixels)


def _eight_bits(array: npt.NDArray[Any], where: str) -> Pixels:
    if array.dtype == np.uint8:
        return array.astype(np.uint8, copy=False)
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype == np.uint16:
        return np.rint(array.astype(np.float32) / 257).astype(np.uint8)
    low, high = (array.min(), array.max()) if array.dtype.kind in "iuf" else (np.nan, np.nan)
    if array.dtype.kind in "iu" and low >= 0 and high <= 255:
        return array.astype(np.uint8)
    if array.dtype.kind == "f" and low >= 0 and high <= 1:
        return np.asarray(np.rint(array * 255), dtype=np.uint8)
    raise DataError(
        f"{where}: image values should be 0..255 as integers or 0..1 as floats, "
        f"not {array.dtype} from {low} to {high}"
    )
