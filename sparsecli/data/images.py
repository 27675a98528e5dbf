"""Labelled images: reads them from where the recipe says, splits them, and makes batches of them."""

from __future__ import annotations

import gzip
import hashlib
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from sparsecli.console import Failure
from sparsecli.data.cache import digest
from sparsecli.data.examples import Example, Prepared
from sparsecli.data.places import images_place
from sparsecli.recipe.data import DigitsImages, ImagesSpec

if TYPE_CHECKING:
    from PIL import Image
    from transformers import BaseImageProcessor, PreTrainedTokenizerFast

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
MIDDLE = 127.5
"""Pixel values p from 0 to 255 become p / MIDDLE - 1."""
IDX_HEADER = {1: 8, 3: 16}
"""Bytes before the values of an IDX file, by its number of axes."""


@dataclass(frozen=True)
class Labelled:
    """Images as pixels (n, size, size, 3), uint8, and their classes (n,), int64."""

    pixels: np.ndarray
    classes: np.ndarray

    def __len__(self) -> int:
        return len(self.classes)

    def where(self, chosen: np.ndarray) -> Labelled:
        """Those for which `chosen`, bool (n,), is true."""
        return Labelled(self.pixels[chosen], self.classes[chosen])


@dataclass(frozen=True)
class ImageSource:
    """What a source holds: names of the classes, images, and those of a held-out split of its own."""

    labels: list[str]
    images: Labelled
    held_out: Labelled | None = None


class ImageExamples(Dataset[Example]):
    """Labelled images, in memory, as what a model of images reads."""

    def __init__(self, images: Labelled) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Example:
        """`pixel_values` (size, size, 3), uint8, and `labels`, a number."""
        return {
            "pixel_values": torch.from_numpy(self.images.pixels[index]),
            "labels": torch.as_tensor(self.images.classes[index]),
        }

    def lengths(self) -> np.ndarray | None:
        return None

    def collate(self, examples: Sequence[Example]) -> Example:
        """`pixel_values` (B, 3, size, size), float32, as `image_processor` makes them, and `labels` (B,)."""
        pixels = torch.stack([example["pixel_values"] for example in examples])
        return {
            "pixel_values": normalized(pixels),
            "labels": torch.stack([example["labels"] for example in examples]),
        }

    def predicted(self, batch: Example) -> int:
        """Images of the batch."""
        return len(batch["labels"])

    def bytes_per_token(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Images have no text."""


def normalized(pixels: Tensor) -> Tensor:
    """Pixels (B, size, size, 3), uint8 -> (B, 3, size, size), float32 from -1 to 1."""
    return pixels.permute(0, 3, 1, 2).float() / MIDDLE - 1


def image_processor(size: int) -> BaseImageProcessor:
    """transformers' processor, which makes of any image what `ImageExamples.collate` makes of ours."""
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    half = [0.5, 0.5, 0.5]
    return ViTImageProcessorPil(
        size={"height": size, "width": size}, image_mean=half, image_std=half, do_convert_rgb=True
    )


def prepare_images(data: ImagesSpec, size: int, classes: int, tuning: bool = False) -> Prepared:
    """Training and held-out images of `size` x `size` pixels; with `tuning` those to choose settings by, too.

    Images are split by a hash of their pixels, so that the tuning images are never trained on, with `tuning` or
    without, and equal images are in one split.

    Raises `Failure` when the images cannot be read, do not have `classes` classes, or too few fill a split.
    """
    source = _digits(size) if isinstance(data, DigitsImages) else _stored(images_place(data), size)
    if len(source.labels) != classes:
        raise Failure(
            f"data: the images have {len(source.labels)} classes, model.classes is {classes}; change it to fit"
        )
    rest, held_out = source.images, source.held_out
    if held_out is None:
        chosen = _shares(rest.pixels, "held out") < data.held_out_fraction
        rest, held_out = rest.where(~chosen), rest.where(chosen)
    chosen = _shares(rest.pixels, "tuning") < data.tuning_fraction
    train, tuned = rest.where(~chosen), rest.where(chosen)
    if data.held_out_images and data.held_out_images < len(held_out):
        order = np.argsort(_shares(held_out.pixels, "order"), kind="stable")[: data.held_out_images]
        held_out = Labelled(held_out.pixels[order], held_out.classes[order])
    for images, use in ((train, "train"), (held_out, "evaluate"), (tuned, "tune")):
        if not len(images):
            raise Failure(f"data: no image is left to {use} on; add images or change the fractions")
    content = hashlib.sha256()
    for images in (train, held_out, tuned):
        content.update(images.pixels.tobytes())
        content.update(images.classes.tobytes())
    return Prepared(
        ImageExamples(train),
        ImageExamples(held_out),
        image_processor(size),
        digest("images-1", content.hexdigest(), *source.labels),
        ImageExamples(tuned) if tuning else None,
        source.labels,
    )


def _shares(pixels: np.ndarray, purpose: str) -> np.ndarray:
    """A number from 0 to 1 for each image (n,), a hash of its pixels and of `purpose`."""
    hashes = [
        hashlib.blake2b(image.tobytes(), digest_size=8, key=purpose.encode()).digest() for image in pixels
    ]
    return np.frombuffer(b"".join(hashes), dtype=">u8") / 2.0**64


# -- sources -------------------------------------------------------------------------------------------------


def _digits(size: int) -> ImageSource:
    """scikit-learn's handwritten digits, whose values from 0 to 16 become 0 to 255."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise Failure("data.source: digits needs scikit-learn: pip install 'sparsecli[vision]'") from None
    found = load_digits()
    pixels = np.rint(found.images * (255 / 16)).astype(np.uint8)
    return ImageSource(
        list(map(str, range(10))), Labelled(_resized(pixels, size), found.target.astype(np.int64))
    )


def _stored(path: Path, size: int) -> ImageSource:
    """See `StoredImages.path`."""
    if path.is_file() and path.suffix == ".npz":
        return _arrays(path, size)
    if _idx_file(path, "train", "images", 3):
        splits = [
            _idx_split(path, name, size) for name in ("train", "t10k") if _idx_file(path, name, "images", 3)
        ]
        return _numbered(splits)
    if (path / "train").is_dir():
        labels = _class_folders(path / "train")
        held_out = _folder(path / "test", labels, size) if (path / "test").is_dir() else None
        return ImageSource(labels, _folder(path / "train", labels, size), held_out)
    labels = _class_folders(path)
    return ImageSource(labels, _folder(path, labels, size))


def _numbered(splits: Sequence[Labelled]) -> ImageSource:
    """A training split, perhaps a held-out one, whose classes are numbers."""
    classes = 1 + max(int(split.classes.max()) for split in splits)
    return ImageSource(list(map(str, range(classes))), *splits)


def _class_folders(path: Path) -> list[str]:
    """Names of the classes: of the folders in `path`, sorted."""
    labels = sorted(each.name for each in path.iterdir() if each.is_dir())
    if not labels:
        raise Failure(f"data.path: {path}: holds no folders of classes, no MNIST files, and is no .npz file")
    return labels


def _folder(path: Path, labels: Sequence[str], size: int) -> Labelled:
    from PIL import Image, UnidentifiedImageError

    images, classes = [], []
    for index, label in enumerate(labels):
        files = sorted(each for each in (path / label).glob("**/*") if each.suffix.lower() in SUFFIXES)
        for file in files:
            try:
                with Image.open(file) as image:
                    images.append(_resized_image(image, size))
            except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
                raise Failure(f"data.path: {file}: is not an image that can be read: {error}") from None
            classes.append(index)
    if not images:
        raise Failure(f"data.path: {path}: holds no images ({', '.join(SUFFIXES)})")
    return Labelled(np.stack(images), np.array(classes, dtype=np.int64))


def _arrays(path: Path, size: int) -> ImageSource:
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in ("x_train", "y_train", "x_test", "y_test") if name in file}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise Failure(f"data.path: {path}: does not load: {error}") from None
    missing = {"x_train", "y_train"} - found.keys()
    if missing or ("x_test" in found) != ("y_test" in found):
        raise Failure(f"data.path: {path}: has no {min(missing or {'y_test and x_test'})}; see data.path")
    return _numbered(
        [
            _labelled(str(path), found[f"x_{name}"], found[f"y_{name}"], size)
            for name in ("train", "test")
            if f"x_{name}" in found
        ]
    )


def _labelled(place: str, pixels: np.ndarray, classes: np.ndarray, size: int) -> Labelled:
    """Arrays of a file as images: pixels (n, height, width) or (n, height, width, 3), classes (n,) or (n, 1)."""
    classes = classes.reshape(-1)
    shaped = pixels.ndim == 3 or (pixels.ndim == 4 and pixels.shape[-1] == 3)
    if pixels.dtype != np.uint8 or not shaped or not len(pixels) or 0 in pixels.shape:
        raise Failure(
            f"data.path: {place}: images are {pixels.dtype} {pixels.shape}; expected uint8 (n, height, width), or with "
            "3 colours at the end"
        )
    if classes.dtype.kind not in "iu" or len(classes) != len(pixels) or classes.min() < 0:
        raise Failure(f"data.path: {place}: expected a class from 0 on, a whole number, for each image")
    return Labelled(_resized(pixels, size), classes.astype(np.int64))


def _resized(pixels: np.ndarray, size: int) -> np.ndarray:
    """Grey or coloured pixels (n, height, width[, 3]) as (n, size, size, 3)."""
    if pixels.ndim == 3:
        pixels = np.repeat(pixels[..., None], 3, axis=-1)
    if pixels.shape[1:3] == (size, size):
        return pixels
    from PIL import Image

    return np.stack([_resized_image(Image.fromarray(image), size) for image in pixels])


def _resized_image(image: Image.Image, size: int) -> np.ndarray:
    """An image as pixels (size, size, 3), in the way of `image_processor`."""
    from PIL import Image

    colours = image.convert("RGB")
    if colours.size != (size, size):
        colours = colours.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(colours)


# -- MNIST's files: IDX -------------------------------------------------------------------------------------


def _idx_file(folder: Path, split: str, what: str, axes: int) -> Path | None:
    """`train-images-idx3-ubyte` and its fellows, as they are or with .gz behind."""
    named = (folder / f"{split}-{what}-idx{axes}-ubyte{end}" for end in ("", ".gz"))
    return next((path for path in named if path.is_file()), None)


def _idx_split(folder: Path, split: str, size: int) -> Labelled:
    labels = _idx_file(folder, split, "labels", 1)
    images = _idx_file(folder, split, "images", 3)
    if labels is None:
        raise Failure(f"data.path: {folder}: has no {split}-labels-idx1-ubyte beside its images")
    assert images
    return _labelled(str(images), _idx(images, 3), _idx(labels, 1), size)


def _idx(path: Path, axes: int) -> np.ndarray:
    """The bytes of an IDX file: a magic number, the sizes of the axes, and the values."""
    open_file: Callable[..., object] = gzip.open if path.suffix == ".gz" else open
    try:
        with open_file(path, "rb") as file:  # type: ignore[attr-defined]
            content = file.read()
    except (OSError, EOFError) as error:
        raise Failure(f"data.path: {path}: does not load: {error}") from None
    header = IDX_HEADER[axes]
    shape = tuple(int(each) for each in np.frombuffer(content[4:header], dtype=">u4"))
    if content[:4] != bytes((0, 0, 8, axes)) or len(content) - header != np.prod(shape, dtype=np.int64):
        raise Failure(f"data.path: {path}: is not an IDX file of {axes} axes of bytes, or is cut short")
    return np.frombuffer(content[header:], dtype=np.uint8).reshape(shape)
