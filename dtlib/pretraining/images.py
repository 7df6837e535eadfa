"""Images as tokens: square crops, row by row, in a palette of 512 colours, as ImageGPT reads."""

import functools
import json
from pathlib import Path

import numpy as np
from PIL import Image
from threadpoolctl import threadpool_limits

from dtlib.errors import UserError
from dtlib.pretraining.corpus import HELD_OUT, Corpus, count_within
from dtlib.seeding import stream_seed
from dtlib.storage import digest, typed

COLOURS = 512  # of the palette; this token begins an image

Images = list[np.ndarray]  # at each scale (M, height, width, 3) uint8


def image(corpus: str, sequence: int) -> Corpus:
    """Return crops of scikit-learn's two "photographs", or the images in a folder of CIFAR-10's.

    The photographs' right fifth and CIFAR-10's test batch are held out. Training crops are mirrored
    at random. Raises UserError if ``sequence`` pixels are no square, and for a wrong folder.
    """
    side = round(sequence**0.5)
    if side * side != sequence:
        raise UserError(f"{sequence} tokens make no square image: try 256 (16 × 16) or 1024.")
    train, kept = _photographs(side) if corpus == "photographs" else _cifar(typed(corpus), side)
    pixels = np.concatenate([images.reshape(-1, 3) for images in train])
    with threadpool_limits(1):  # the same rounding on any number of cores
        palette = _palette(pixels)
        train, kept = ([_tokens(palette, part) for part in parts] for parts in (train, kept))

    def crops(maps: Images, generator: np.random.Generator, count: int, mirror: bool) -> np.ndarray:
        tokens = np.full((count, sequence + 1), COLOURS)
        for row in tokens:
            images = maps[generator.integers(len(maps))]
            places = np.array(images.shape) - (0, side - 1, side - 1)
            which, top, left = (generator.integers(number) for number in places)
            crop = images[which, top : top + side, left : left + side]
            row[1:] = (crop[:, ::-1] if mirror and generator.integers(2) else crop).ravel()
        return tokens

    generator = np.random.default_rng(stream_seed(0, "held-out crops"))
    held_out = crops(kept, generator, count_within(sequence, *HELD_OUT), mirror=False)
    sizes = {"train": len(pixels), "held_out": sum(images.size for images in kept)}
    facts = {"corpus": corpus, "side": side, "colours": COLOURS, "sha256": digest(pixels.tobytes())}
    processor = {
        "image_processor_type": "ImageGPTImageProcessor",
        "size": {"height": side, "width": side},
        "clusters": palette.cluster_centers_.round(6).tolist(),
    }
    files = {"preprocessor_config.json": json.dumps(processor) + "\n"}
    sample = functools.partial(crops, train, mirror=True)
    return Corpus(COLOURS, sample, held_out, facts | {"pixels": sizes}, files)


def _palette(pixels: np.ndarray) -> object:
    """k-means of the colours, scaled to [-1, 1]."""
    from sklearn.cluster import KMeans  # slow to import

    generator = np.random.default_rng(stream_seed(0, "palette"))
    chosen = pixels[generator.integers(len(pixels), size=50_000)] / 127.5 - 1
    return KMeans(COLOURS, n_init=1, random_state=0).fit(chosen)


def _tokens(palette: object, images: np.ndarray) -> np.ndarray:
    return palette.predict(images.reshape(-1, 3) / 127.5 - 1).reshape(images.shape[:3])


def _photographs(side: int) -> tuple[Images, Images]:
    """Left and right parts in several scales, each with half the last one's area."""
    from sklearn.datasets import load_sample_images

    photographs = load_sample_images().images
    width = photographs[0].shape[1]
    edge = round(0.8 * width)
    if side > width - edge:
        raise UserError(f"Held-out photographs are {width - edge} pixels wide: try fewer tokens.")

    def scaled(columns: slice, factor: float) -> np.ndarray:
        parts = [photograph[:, columns] for photograph in photographs]
        size = [round(length / factor) for length in parts[0].shape[1::-1]]
        box = Image.Resampling.BOX
        return np.stack([Image.fromarray(part).resize(size, box) for part in parts])

    factors = [2 ** (k / 2) for k in range(int(2 * np.log2((width - edge) / side)) + 1)]
    left, right = slice(edge), slice(edge, None)
    return [scaled(left, f) for f in factors], [scaled(right, f) for f in factors]


def _cifar(folder: Path, side: int) -> tuple[Images, Images]:
    """CIFAR-10's binary edition: for each image a label byte and 3 × 32 × 32 colour bytes."""
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    if not all((folder / name).is_file() for name in names):
        what = f"{folder} is neither 'photographs' nor a folder of CIFAR-10's binary edition"
        raise UserError(f"{what} (pickles are not opened): expected {', '.join(names)}.")
    if 32 % side:
        raise UserError(f"32 × 32 images do not shrink evenly to {side} × {side}: try 256 tokens.")

    def read(name: str) -> np.ndarray:
        content = np.fromfile(folder / name, np.uint8)
        if not len(content) or len(content) % 3073:
            raise UserError(f"{folder / name} is not a whole file of CIFAR-10's: get it anew.")
        images = content.reshape(-1, 3073)[:, 1:].reshape(-1, 3, side, 32 // side, side, 32 // side)
        return images.mean((3, 5)).round().astype(np.uint8).transpose(0, 2, 3, 1)

    *train, test = map(read, names)
    return [np.concatenate(train)], [test]
