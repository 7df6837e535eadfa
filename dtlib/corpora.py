"""What starting points are trained on: English that comes with every install, photographs, Markov chains; as tokens."""

import ast
import contextlib
import hashlib
import json
import re
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import tokenizers
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save_file
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from dtlib.errors import UserError, atomic_write, cache_root, locked
from dtlib.seeding import stream_seed

HELD_OUT = 512, 131_072  # sequences and tokens, at most, of a corpus's held-out sample
STATES = 100  # of a Markov chain (Wang et al. 2024)
TEMPERATURE = 0.25  # theirs is 1, where guessing is within 1 % of the entropy rate: minutes of training learn nothing there
COLOURS = 512  # of an image's palette, as in ImageGPT
LAYOUT = 1  # of the cached language corpora
LICENCE = re.compile("licensed under|permission is hereby granted|redistribution and use|without warrant|gnu general public",
                     re.IGNORECASE)
ROOT = "dtlib"  # the distribution whose requirements' docstrings are read


@dataclass(frozen=True)
class Corpus:
    """Tokens to learn from. A sequence (T + 1,) int64 holds T tokens to predict and, first, what comes before them.

    ``vocabulary``: how many tokens can be predicted; ``sample(generator, B)`` draws training sequences (B, T + 1);
    ``held_out`` (N, T + 1) comes from documents, places or draws that ``sample`` never sees; ``facts`` describe it;
    ``files``: texts, by name, that belong beside a model trained on it (its tokenizer or palette).
    """

    vocabulary: int
    sample: object
    held_out: np.ndarray
    facts: dict
    files: dict[str, str]

    def baselines(self, sequences: int = 20_000) -> dict[str, float]:
        """Held-out loss in nats per token of what counting can do: uniform, unigram, bigram and, for images, the pixel above.

        Counts come from ``sequences`` training sequences; absolute discounting (0.75) with the unigram as back-off.
        """
        drawn = self.sample(np.random.default_rng(stream_seed(0, "baselines")), sequences)
        losses = {"uniform": float(np.log(self.vocabulary))}
        counts = np.bincount(drawn[:, 1:].ravel(), minlength=self.vocabulary) + 1.0
        unigram = counts / counts.sum()
        losses["unigram"] = float(-np.log(unigram[self.held_out[:, 1:]]).mean())
        places = {"bigram": 1, **({"pixel above": self.facts["side"]} if "side" in self.facts else {})}
        return losses | {name: _bigram_loss(drawn, self.held_out, back, unigram) for name, back in places.items()}


def _bigram_loss(drawn: np.ndarray, held_out: np.ndarray, back: int, unigram: np.ndarray, discount: float = 0.75) -> float:
    """Loss of p(token | the token ``back`` places before it); with no such token in the sequence, the one before it all."""
    def pairs(sequences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        padded = np.hstack([np.repeat(sequences[:, :1], back - 1, axis=1), sequences])
        return padded[:, :-back].ravel(), sequences[:, 1:].ravel()

    before, after = pairs(drawn)
    shape = (max(drawn.max(), held_out.max()) + 1, len(unigram))
    import scipy.sparse  # slow to import, as scikit-learn
    counts = scipy.sparse.coo_array((np.ones(len(after)), (before, after)), shape).tocsr()
    total, kinds = np.maximum(counts.sum(1), 1e-9), np.diff(counts.indptr)
    before, after = pairs(held_out)
    seen = np.maximum(np.asarray(counts[before, after]).ravel() - discount, 0) / total[before]
    left = np.where(kinds[before] > 0, discount * kinds[before] / total[before], 1.0)
    return float(-np.log(seen + left * unigram[after]).mean())


def count_within(sequence: int, sequences: int, tokens: int) -> int:
    """How many sequences of ``sequence`` tokens to measure a loss on, ``sequences`` and ``tokens`` at most: of long ones
    fewer, or a large model's loss takes longer than its steps."""
    return max(1, min(sequences, tokens // sequence))


# --- language ---------------------------------------------------------------------------------------------------------


def language(corpus: str, sequence: int, vocabulary: int = 0, progress: bool = True, tokenizer: str | None = None) -> Corpus:
    """English: "installed" (docstrings of all that is required, reference topics), "python" (Python's own part of these),
    "wikitext-2", "wikitext-103" (network), or a folder of text.

    In tokens of ``tokenizer`` (a tokenizer.json), or of one with ``vocabulary`` tokens that is learnt here. One document in
    twenty, chosen by its hash, is held out. ``UserError``: no such corpus, no text in it, no network.
    """
    about = [LAYOUT, tokenizer or vocabulary, tokenizers.__version__, _identity(corpus)]
    key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:12]
    path = cache_root() / "corpora" / f"language-{key}.safetensors"
    with locked(path):
        if not path.exists():
            _tokenise(corpus, tokenizer or vocabulary, path, progress)
    with safe_open(path, framework="np") as file:
        facts, tokenizer = json.loads(file.metadata()["facts"]) | {"corpus": corpus}, file.metadata()["tokenizer"]
        vocabulary = vocabulary or len(json.loads(tokenizer)["model"]["vocab"])
        stream, kept = file.get_tensor("train"), file.get_tensor("held_out")
    if min(len(stream), len(kept)) < sequence + 1:
        raise UserError(f"The corpus {corpus!r} has only {len(stream)} tokens to learn from and {len(kept)} held out, where a "
                        f"sequence takes {sequence + 1}: give more text.")

    def cut(tokens: np.ndarray, starts: np.ndarray) -> np.ndarray:
        return tokens[starts[:, None] + np.arange(sequence + 1)].astype(np.int64)

    places = np.linspace(0, len(kept) - sequence - 1, min(count_within(sequence, *HELD_OUT), len(kept) // sequence))
    held_out = cut(kept, places.astype(np.int64))
    return Corpus(vocabulary, lambda generator, count: cut(stream, generator.integers(len(stream) - sequence, size=count)),
                  held_out, facts, {"tokenizer.json": tokenizer, "tokenizer_config.json": json.dumps(
                      {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}) + "\n"})


def _identity(corpus: str) -> object:
    """What decides a corpus's text."""
    if corpus in ("installed", "python"):
        required = _required() if corpus == "installed" else []
        return [sysconfig.get_python_version(), *(f"{name} {metadata.version(name)}" for name in required)]
    if Path(corpus).is_dir():
        return [hashlib.sha256(path.read_bytes()).hexdigest() for path in _text_files(Path(corpus))]
    if corpus in ("wikitext-2", "wikitext-103"):
        return corpus
    raise UserError(f"Unknown corpus {corpus!r}: expected installed, python, wikitext-2, wikitext-103 or a folder of text "
                    "files.")


def _text_files(folder: Path) -> list[Path]:
    kinds = (".txt", ".md", ".rst", ".tokens", ".raw")
    files = sorted(path for path in folder.rglob("*") if path.suffix in kinds and path.is_file())
    if not any(path.stat().st_size for path in files):
        raise UserError(f"{folder} holds no text: expected .txt, .md, .rst, .tokens or .raw files in UTF-8.")
    return files


def _required() -> list[str]:
    """Names of the distributions that this package requires, directly or not, on this machine, sorted."""
    found, queue = set(), [ROOT]
    while queue:
        for line in metadata.requires(queue.pop()) or []:
            name = re.match(r"[\w.-]+", line)[0].lower().replace("_", "-").replace(".", "-")
            if "extra ==" in line or name in found:
                continue
            with contextlib.suppress(metadata.PackageNotFoundError):  # required on other platforms only
                metadata.version(name)
                found.add(name)
                queue.append(name)
    return sorted(name for name in found if not name.startswith(("nvidia-", "cuda-", "triton")))


def _documents(corpus: str, progress: bool) -> Iterator[tuple[str, str]]:
    """(source, text) of every document, before any is dropped."""
    if corpus in ("installed", "python"):
        library = Path(sysconfig.get_path("stdlib"))
        files = {"Python": sorted(path for path in library.rglob("*.py") if "site-packages" not in path.parts)}
        for name in _required() if corpus == "installed" else []:
            listed = metadata.files(name) or []
            files[name] = sorted(Path(path.locate()) for path in listed if path.suffix == ".py")
        from pydoc_data.topics import topics
        yield from (("Python's reference topics", text) for _, text in sorted(topics.items()))
        for source, path in tqdm([(source, path) for source, paths in files.items() for path in paths],
                                 desc="reading docstrings", unit=" files", disable=not progress):
            yield from ((source, text) for text in docstrings(path))
    elif Path(corpus).is_dir():
        for path in _text_files(Path(corpus)):
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{path} is not UTF-8 text ({error}): convert it, or take it out of the folder.") from error
            yield from ((path.name, part) for part in re.split(r"\n(?= = [^=]+ = \n)|\n{3,}", text))
    else:
        try:
            from datasets import load_dataset
            articles = load_dataset("Salesforce/wikitext", f"{corpus}-raw-v1", split="train")
        except Exception as error:  # the client raises many unrelated kinds; each means that there is no text
            raise UserError(f"Could not get {corpus} ({type(error).__name__}: {error}): install the `datasets` package and "
                            "connect to a network, or give a folder with its text files instead.") from error
        yield from ((corpus, part) for part in re.split(r"\n(?= = [^=]+ = \n)", "".join(articles["text"])))


def docstrings(path: Path) -> list[str]:
    """The docstrings of a Python file, without running it; of one that this Python cannot parse, none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's invalid escapes
        try:
            nodes = list(ast.walk(ast.parse(path.read_bytes())))
        except (SyntaxError, ValueError, OSError, RecursionError, MemoryError):  # the last two: nested too deeply
            return []
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [text for node in nodes if isinstance(node, documented) and (text := ast.get_docstring(node))]


def is_prose(text: str) -> bool:
    """Not a licence, and mostly words: at least five, and three characters of four are letters or blanks."""
    plain = sum(character.isalpha() or character.isspace() for character in text)
    return len(text.split()) >= 5 and plain >= 0.75 * len(text) and not LICENCE.search(text)


def _learn(texts: list[str], corpus: str, vocabulary: int) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=["<|endoftext|>"], show_progress=False,
                                             initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainer)
    if (learnt := tokenizer.get_vocab_size()) < vocabulary:
        raise UserError(f"The corpus {corpus!r} yields {learnt} tokens, not {vocabulary}: more text, or vocabulary={learnt}.")
    return tokenizer


def _tokenise(corpus: str, given: str | int, path: Path, progress: bool) -> None:
    """Write the corpus's tokens, its tokenizer and its facts. ``given``: a tokenizer.json, or how many tokens a byte-level BPE
    shall learn on the training documents."""
    seen, sources, parts, digest = set(), {}, {"train": [], "held_out": []}, hashlib.sha256()
    for source, document in _documents(corpus, progress):
        text = document.strip()
        fingerprint = hashlib.sha256(" ".join(text.split()).encode()).digest()
        if fingerprint in seen or not is_prose(text):
            continue
        seen.add(fingerprint)
        digest.update(fingerprint)
        parts["held_out" if fingerprint[0] % 20 == 0 else "train"].append(text)
        documents, characters = sources.get(source, (0, 0))
        sources[source] = documents + 1, characters + len(text)
    if not parts["train"] or not parts["held_out"]:
        raise UserError(f"The corpus {corpus!r} has too little prose ({len(seen)} documents): give a folder with more text.")
    tokenizer = tokenizers.Tokenizer.from_str(given) if isinstance(given, str) else _learn(parts["train"], corpus, given)
    end = tokenizer.token_to_id("<|endoftext|>")  # after each document
    if end is None:
        raise UserError("The tokenizer has no token <|endoftext|>, which ends a document of GPT-2's: give a model that has it.")
    streams = {}
    for part, texts in parts.items():
        batches = (tokenizer.encode_batch(texts[i:i + 1000]) for i in tqdm(
            range(0, len(texts), 1000), desc=f"tokenising ({part})", unit="000 documents", disable=not progress))
        streams[part] = np.concatenate([np.array([token for document in batch for token in [*document.ids, end]], np.uint16)
                                        for batch in batches])
    facts = {"corpus": corpus, "characters": sum(map(len, parts["train"] + parts["held_out"])), "documents": len(seen),
             "tokens": {part: len(tokens) for part, tokens in streams.items()}, "sha256": digest.hexdigest(),
             "sources": {name: {"documents": count, "characters": size} for name, (count, size) in sources.items()}}
    with atomic_write(path) as temporary:
        save_file(streams, temporary, metadata={"facts": json.dumps(facts), "tokenizer": tokenizer.to_str(pretty=False)})


# --- images -----------------------------------------------------------------------------------------------------------


def image(corpus: str, sequence: int) -> Corpus:
    """Square crops, row by row, in a palette of 512 colours (k-means, as ImageGPT): "photographs" or CIFAR-10's folder.

    Of scikit-learn's two photographs the right fifth is held out; crops of several scales (each half the last one's area)
    are mirrored at random. Of CIFAR-10's *binary* edition the test batch is held out. A sequence begins with token 512.
    ``UserError``: a sequence that is no square, no such folder.
    """
    side = round(sequence ** 0.5)
    if side * side != sequence:
        raise UserError(f"{sequence} tokens make no square image: give a sequence such as 256 (16 × 16) or 1024 (32 × 32).")
    levels = _photographs(side) if corpus == "photographs" else _cifar(Path(corpus), side)
    pixels = np.concatenate([train.reshape(-1, 3) for train, _ in levels])
    generator = np.random.default_rng(stream_seed(0, "palette"))
    chosen = pixels[generator.integers(len(pixels), size=50_000)] / 127.5 - 1
    with threadpool_limits(1):  # the same rounding on any number of cores
        from sklearn.cluster import KMeans  # slow to import, and only needed where images are
        palette = KMeans(COLOURS, n_init=1, random_state=0).fit(chosen)
        maps = [[palette.predict(part.reshape(-1, 3) / 127.5 - 1).reshape(part.shape[:3]) for part in level]
                for level in levels]

    def crops(part: int, generator: np.random.Generator, count: int, mirror: bool) -> np.ndarray:
        out = np.full((count, sequence + 1), COLOURS)
        for row in out:
            level = maps[generator.integers(len(maps))][part]
            which, top, left = (generator.integers(n) for n in np.array(level.shape) - (0, side - 1, side - 1))
            crop = level[which, top:top + side, left:left + side]
            row[1:] = (crop[:, ::-1] if mirror and generator.integers(2) else crop).ravel()
        return out

    processor = {"image_processor_type": "ImageGPTImageProcessor", "size": {"height": side, "width": side},
                 "clusters": palette.cluster_centers_.round(6).tolist()}
    held_out = crops(1, np.random.default_rng(stream_seed(0, "held-out crops")), count_within(sequence, *HELD_OUT),
                     mirror=False)
    facts = {"corpus": corpus, "side": side, "colours": COLOURS, "sha256": hashlib.sha256(pixels.tobytes()).hexdigest(),
             "pixels": {"train": sum(a[..., 0].size for a, _ in levels), "held_out": sum(b[..., 0].size for _, b in levels)}}
    return Corpus(COLOURS, lambda generator, count: crops(0, generator, count, mirror=True), held_out, facts,
                  {"preprocessor_config.json": json.dumps(processor) + "\n"})


def _photographs(side: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """At each scale, the (2, height, width, 3) uint8 photographs' training and held-out parts; crops span side·√2ᵏ pixels."""
    from sklearn.datasets import load_sample_images
    photographs, levels = load_sample_images().images, []
    height, width, _ = photographs[0].shape
    edge = round(0.8 * width)
    if side > width - edge:
        raise UserError(f"The photographs' held-out parts are {width - edge} pixels wide: give a smaller square.")
    for k in range(int(2 * np.log2((width - edge) / side)) + 1):
        levels.append(tuple(np.stack([_shrink(photograph[:, part], 2 ** (k / 2)) for photograph in photographs])
                            for part in (slice(edge), slice(edge, None))))
    return levels


def _shrink(picture: np.ndarray, factor: float) -> np.ndarray:
    size = [round(n / factor) for n in picture.shape[1::-1]]
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BOX))


def _cifar(folder: Path, side: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """CIFAR-10's images (M, side, side, 3) uint8: a file has a label byte and 3 × 32 × 32 colour bytes for each image."""
    def read(name: str) -> np.ndarray:
        content = np.fromfile(folder / name, np.uint8)
        if not len(content) or len(content) % 3073:
            raise UserError(f"{folder / name} is not a whole file of CIFAR-10's binary edition: get it anew.")
        images = content.reshape(-1, 3073)[:, 1:].reshape(-1, 3, side, 32 // side, side, 32 // side)
        return images.mean((3, 5)).round().astype(np.uint8).transpose(0, 2, 3, 1)

    names = [f"data_batch_{i}.bin" for i in range(1, 6)]
    if not all((folder / name).is_file() for name in [*names, "test_batch.bin"]):
        raise UserError(f"{folder} is neither 'photographs' nor a folder of CIFAR-10's binary edition, data_batch_1.bin "
                        "to _5.bin and test_batch.bin: get that one (the Python edition is pickles, which are not opened).")
    if 32 % side:
        raise UserError(f"CIFAR-10's 32 × 32 images do not shrink evenly to {side} × {side}: give a sequence of 256 or 1024.")
    return [(np.concatenate([read(name) for name in names]), read("test_batch.bin"))]


# --- synthetic --------------------------------------------------------------------------------------------------------


def transition_matrix(kind: str, seed: int, temperature: float = TEMPERATURE) -> np.ndarray:
    """Probabilities (100, 100) of the next state: rows softmax(U[0, 1] / temperature) if "markov", uniform if "iid"."""
    logits = np.random.default_rng(stream_seed(seed, "chain")).random((STATES, STATES)) * (kind == "markov") / temperature
    return np.exp(logits) / np.exp(logits).sum(1, keepdims=True)


def stationary(matrix: np.ndarray) -> np.ndarray:
    """The distribution (states,) that ``matrix`` leaves as it is."""
    return np.linalg.matrix_power(matrix, 64)[0]


def entropy_rate(matrix: np.ndarray) -> float:
    """Nats per token of the chain: the loss of a model that knows it, and the least that any model can reach."""
    return float(-stationary(matrix) @ (matrix * np.log(matrix)).sum(1))


def synthetic(kind: str, seed: int, sequence: int) -> Corpus:
    """Order-1 Markov chain of 100 states, or independent uniform tokens; another chain for every seed."""
    matrix = transition_matrix(kind, seed)
    cumulative, first = matrix.cumsum(1), stationary(matrix).cumsum()
    cumulative[:, -1] = first[-1] = 1  # not a rounding error below

    def sample(generator: np.random.Generator, count: int) -> np.ndarray:
        uniform, out = generator.random((sequence + 1, count)), np.empty((sequence + 1, count), np.int64)
        for step, draw in enumerate(uniform):
            out[step] = ((first if step == 0 else cumulative[out[step - 1]]) < draw[:, None]).sum(-1)
        return np.ascontiguousarray(out.T)

    held_out = sample(np.random.default_rng(stream_seed(seed, "held-out tokens")), count_within(sequence, *HELD_OUT))
    known = float(-np.log(matrix[held_out[:, :-1], held_out[:, 1:]]).mean())
    facts = {"states": STATES, "temperature": TEMPERATURE if kind == "markov" else None, "entropy_rate": entropy_rate(matrix),
             "loss_of_the_chain_itself": known}
    return Corpus(STATES, sample, held_out, facts, {})
