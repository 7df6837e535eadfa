"""English as tokens: texts that come with every install, WikiText, or a folder of text files."""

import ast
import contextlib
import hashlib
import json
import platform
import re
import sysconfig
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import numpy as np
import tokenizers
import torch
from tokenizers.pre_tokenizers import ByteLevel

from dtlib import storage
from dtlib.errors import UserError, explained
from dtlib.pretraining.corpus import HELD_OUT, Corpus, count_within
from dtlib.progress import tqdm
from dtlib.storage import digest, typed, write_text

LAYOUT = 1  # of the cached tokens
TEXTS = (".txt", ".md", ".rst", ".tokens", ".raw")
END = "<|endoftext|>"  # the token after each document
ARTICLE = r"\n(?= = [^=]+ = \n)"  # before the title of an article of WikiText
LICENCE = "licensed under|permission is hereby granted|redistribution and use|without warrant"
LICENCE += "|gnu general public"


def language(
    corpus: str,
    sequence: int,
    vocabulary: int = 0,
    progress: bool = True,
    tokenizer: str | None = None,
) -> Corpus:
    """Return the tokens of ``corpus``; one document in twenty, by its hash, is held out.

    ``corpus``: "installed" (Python's help; docstrings of Python and the packages in installed.txt),
    "python" (without the packages), "wikitext-2", "wikitext-103" (network), or a folder of text.
    ``tokenizer``: the content of a tokenizer.json; None: learn a byte-level BPE of ``vocabulary``
    tokens. Raises UserError for an unknown corpus, too little text, or no network.
    """
    identity, documents = _source(corpus, progress)
    given = vocabulary if tokenizer is None else _checked(tokenizer)
    key = digest([LAYOUT, given, tokenizers.__version__, identity])
    folder = storage.cache_root() / "corpora" / f"language-{key[:12]}"
    with storage.growing(folder, remake=True) as partial:
        if partial:
            _tokenise(documents, corpus, given, partial)
            storage.seal(partial)
    tokenizer = (folder / "tokenizer.json").read_text(encoding="utf-8")
    streams = storage.read_tensors(folder / "tokens.safetensors")
    train, kept = streams["train"].numpy(), streams["held_out"].numpy()
    if min(len(train), len(kept)) < sequence + 1:
        has = f"has only {len(train)} tokens to learn from and {len(kept)} held out"
        needs = f"where a sequence takes {sequence + 1}: give more text"
        raise UserError(f"The corpus {corpus!r} {has}, {needs}.")

    def cut(tokens: np.ndarray, first: np.ndarray) -> np.ndarray:
        return tokens[first[:, None] + np.arange(sequence + 1)].astype(np.int64)

    def sample(generator: np.random.Generator, count: int) -> np.ndarray:
        return cut(train, generator.integers(len(train) - sequence, size=count))

    count = min(count_within(sequence, *HELD_OUT), len(kept) // sequence)
    held_out = cut(kept, np.linspace(0, len(kept) - sequence - 1, count).astype(np.int64))
    facts = {"corpus": corpus, **json.loads((folder / "facts.json").read_text(encoding="utf-8"))}
    loader = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}) + "\n"
    files = {"tokenizer.json": tokenizer, "tokenizer_config.json": loader}
    return Corpus(len(json.loads(tokenizer)["model"]["vocab"]), sample, held_out, facts, files)


def _source(corpus: str, progress: bool) -> tuple[object, Iterator[tuple[str, str]]]:
    """What decides a corpus's text, and (source, text) of its documents."""
    if corpus in ("installed", "python"):
        packages = installed_versions() if corpus == "installed" else {}
        identity = [platform.python_version(), *map(" ".join, packages.items())]
        return identity, _python_documents(packages, progress)
    if corpus and typed(corpus).is_dir():
        files = text_files(corpus)
        if not any(path.stat().st_size for path in files):
            raise UserError(f"{corpus} holds no text: expected UTF-8 files {', '.join(TEXTS)}.")
        return [digest(path) for path in files], _file_documents(files)
    if corpus in ("wikitext-2", "wikitext-103"):
        return corpus, _wikitext_documents(corpus)
    known = "installed, python, wikitext-2, wikitext-103 or a folder of text files"
    raise UserError(f"Unknown corpus {corpus!r}: expected {known}.")


def text_identity(corpus: str) -> str:
    """Return a digest of what decides a corpus's text: versions, or the files' content."""
    return digest(_source(corpus, False)[0])[:16]


def text_files(corpus: str) -> list[Path]:
    """Return the text files of a corpus that is a folder; of others, none."""
    if not corpus or not typed(corpus).is_dir():
        return []
    found = typed(corpus).rglob("*")
    return sorted(path for path in found if path.suffix.lower() in TEXTS and path.is_file())


def _checked(tokenizer: str) -> str:
    """Return the content of a tokenizer.json. Raises UserError if it is none, or empty."""
    what = "This is no tokenizer.json that can be used"
    with explained(what, "bring the model's own", Exception):  # the library raises plain ones
        learnt = tokenizers.Tokenizer.from_str(tokenizer)
        if len(json.loads(tokenizer)["model"]["vocab"]) < 2 or learnt.get_vocab_size() > 65536:
            raise ValueError("it must have 2 to 65,536 tokens")
    return tokenizer


def installed_versions() -> dict[str, str]:
    """Return the versions of the packages in installed.txt that are here (some need Linux)."""
    versions = {}
    for name in Path(__file__).with_name("installed.txt").read_text(encoding="utf-8").split():
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def _python_documents(packages: dict, progress: bool) -> Iterator[tuple[str, str]]:
    from pydoc_data.topics import topics

    yield from (("Python's reference topics", topics[name]) for name in sorted(topics))
    library = Path(sysconfig.get_path("stdlib"))
    own = [path for path in library.rglob("*.py") if "site-packages" not in path.parts]
    files = [("Python", path) for path in sorted(own)]
    for name in packages:
        paths = sorted(Path(path.locate()) for path in metadata.files(name) or [])
        files += [(name, path) for path in paths if path.suffix == ".py"]
    for source, path in tqdm(files, "reading docstrings", unit=" files", disable=not progress):
        yield from ((source, text) for text in docstrings(path))


def docstrings(path: Path) -> list[str]:
    """Return a Python file's docstrings, without running it; none if it cannot be parsed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's invalid escapes
        try:
            nodes = list(ast.walk(ast.parse(path.read_bytes())))
        except (SyntaxError, ValueError, OSError, RecursionError, MemoryError):
            return []  # the last two: nested too deeply
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = (ast.get_docstring(node) for node in nodes if isinstance(node, documented))
    return [text for text in texts if text]


def _file_documents(files: list[Path]) -> Iterator[tuple[str, str]]:
    for path in files:
        with explained(f"{path} is not UTF-8 text", "convert or remove it", UnicodeDecodeError):
            text = path.read_text(encoding="utf-8")
        yield from ((path.name, part) for part in re.split(ARTICLE + r"|\n{3,}", text))


def _wikitext_documents(corpus: str) -> Iterator[tuple[str, str]]:
    advice = "install `datasets` and connect to a network, or give a folder of text"
    with explained(f"Could not get {corpus}", advice, Exception):  # of many unrelated kinds
        from datasets import load_dataset

        lines = load_dataset("Salesforce/wikitext", f"{corpus}-raw-v1", split="train")["text"]
    yield from ((corpus, part) for part in re.split(ARTICLE, "".join(lines)))


def is_prose(text: str) -> bool:
    """Return whether text has five words, three quarters letters and blanks, and no licence."""
    plain = sum(character.isalpha() or character.isspace() for character in text)
    licence = re.search(LICENCE, text, re.IGNORECASE)
    return len(text.split()) >= 5 and plain >= 0.75 * len(text) and not licence


def _tokenise(documents: Iterator, corpus: str, given: str | int, folder: Path) -> None:
    """Write tokens.safetensors, tokenizer.json (``given``, or of so many tokens) and facts.json."""
    chosen = {}  # by their words' hash, so that each counts once
    for source, document in documents:
        text = document.strip()
        words_hash = hashlib.sha256(" ".join(text.split()).encode()).digest()
        if words_hash not in chosen and is_prose(text):
            chosen[words_hash] = source, text
    texts, sources = {"train": [], "held_out": []}, {}
    for words_hash, (source, text) in chosen.items():
        texts["train" if words_hash[0] % 20 else "held_out"].append(text)
        size = sources.setdefault(source, {"documents": 0, "characters": 0})
        size["documents"] += 1
        size["characters"] += len(text)
    if not all(texts.values()):
        raise UserError(f"The corpus {corpus!r} has too little prose ({len(chosen)} documents).")
    learn = isinstance(given, int)
    tokenizer = _learn(texts["train"], given) if learn else tokenizers.Tokenizer.from_str(given)
    learnt, end = tokenizer.get_vocab_size(), tokenizer.token_to_id(END)
    if learn and learnt < given:
        advice = f"more text, or vocabulary={learnt}"
        raise UserError(f"The corpus {corpus!r} yields {learnt} tokens, not {given}: {advice}.")
    if end is None:
        raise UserError(f"The tokenizer has no token {END}, the end of a document: give another.")

    def tokens(found: list[str]) -> Iterator[int]:
        for i in range(0, len(found), 1000):
            for encoded in tokenizer.encode_batch(found[i : i + 1000]):
                yield from (*encoded.ids, end)

    streams = {part: np.fromiter(tokens(found), np.uint16) for part, found in texts.items()}
    facts = {
        "characters": sum(size["characters"] for size in sources.values()),
        "documents": len(chosen),
        "tokens": {part: len(stream) for part, stream in streams.items()},
        "sha256": digest(*chosen),
        "sources": sources,
    }
    streams = {part: torch.from_numpy(stream) for part, stream in streams.items()}
    storage.write_tensors(folder / "tokens.safetensors", streams)
    write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=False))
    write_text(folder / "facts.json", facts)


def _learn(texts: list[str], vocabulary: int) -> tokenizers.Tokenizer:
    """A byte-level BPE of ``vocabulary`` tokens, or of as many as ``texts`` yield."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    known = {"special_tokens": [END], "initial_alphabet": ByteLevel.alphabet()}
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=vocabulary, show_progress=False, **known)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
