"""What starting points learn from: no code is run, nothing both learnt and held out, baselines."""

import collections
import json
import random
import sys
import types

import numpy as np
import pytest
from safetensors.numpy import load_file
from scipy.special import softmax
from tokenizers import Tokenizer
from transformers import AutoTokenizer, ImageGPTImageProcessorPil

from dtlib.errors import UserError
from dtlib.pretraining import images, language, synthetic
from dtlib.pretraining.corpus import Corpus
from dtlib.seeding import stream_seed
from dtlib.storage import digest

PROSE = "Return the sum of all of the numbers, or zero if there are none."
LETTERS = "abcdefghijklmnopqrstuvwxyzäé"
WORDS = ["".join(random.Random(i).choices(LETTERS, k=2 + i % 8)) for i in range(400)]
DOCUMENTS = [
    f"Document {i}: {' '.join(random.Random(f'{i}').choices(WORDS, k=30))} “{i}” naïve…\n\tend ☃"
    for i in range(300)
]
CODE = "x = f(a, b)[0] + {1: 2}; y = g(c, d)[1] - {3: 4}"
LICENCE = PROSE + " Permission is hereby GRANTED, free of charge."
MODULE = '''"""A module."""
open({place!r}, "w")
class A:
    """A class."""
    async def f(self):
        """A
        method.
        """
        return "no docstring"
'''
SEPARATOR = "\n\n\n"


@pytest.fixture(autouse=True)
def cached(tmp_path, monkeypatch):
    """A cache of the test's own; call it for the files in there."""
    monkeypatch.setenv("DTLIB_CACHE", str(tmp_path / "cache"))
    return lambda: [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def read(corpus, sequence=20, vocabulary=400):
    return language.language(str(corpus), sequence, vocabulary, progress=False)


def streams_in(cache):
    """The tokens in a cache of one language corpus."""
    (file,) = cache.rglob("tokens.safetensors")
    return load_file(file)


@pytest.fixture
def folder(tmp_path):
    """300 documents in two files, and what must not be learnt: a licence, code, repetitions."""
    others = [f"\n  {document.replace(' ', '   ')}" for document in DOCUMENTS[::3]]
    deeper = tmp_path / "text" / "deeper.md"  # a folder, whatever its name says
    deeper.mkdir(parents=True)
    (deeper / "b.txt").write_text(SEPARATOR.join([*DOCUMENTS[200:], *others, CODE, LICENCE]))
    (tmp_path / "text" / "a.md").write_text(SEPARATOR.join(DOCUMENTS[:200]))
    (tmp_path / "text" / "c.py").write_text(PROSE)  # of another kind
    return tmp_path / "text"


def test_docstrings_are_read_without_executing_and_prose_is_chosen(tmp_path):
    path, executed = tmp_path / "module.py", tmp_path / "executed"
    path.write_text(MODULE.format(place=str(executed)))
    assert language.docstrings(path) == ["A module.", "A class.", "A\nmethod."]
    assert language.docstrings(tmp_path / "absent.py") == [] and not executed.exists()
    wrong = [b"print 'Python 2'", b"\xff\xfe", b"x = '\0'"]
    nested = [b"x = " + b"-" * 10**6 + b"1", b"x = a" + b".a" * 10**5]
    for code in wrong + nested:
        path.write_bytes(b'"""A module."""\n' + code)
        assert language.docstrings(path) == []
    texts = [PROSE, "Ein Satz auf Deutsch, für fünf Wörter.", "Too short to say.", CODE, LICENCE]
    assert [language.is_prose(text) for text in texts] == [True, True, False, False, False]


def test_language_of_a_folder(folder, tmp_path):
    corpus, streams = read(folder), streams_in(tmp_path / "cache")
    tokenizer = Tokenizer.from_str(corpus.files["tokenizer.json"])
    assert tokenizer.get_vocab_size() == corpus.vocabulary == 400
    assert max(stream.max() for stream in streams.values()) < 400
    train, held_out = (
        [tokenizer.decode(ids.tolist()) for ids in np.split(part, np.flatnonzero(part == 0))]
        for part in (streams["train"][:-1], streams["held_out"][:-1])
    )
    # Every document once, to the byte; none of what must not be learnt; none in both parts.
    assert collections.Counter(train + held_out) == collections.Counter(DOCUMENTS)
    assert 5 <= len(held_out) <= 30 and corpus.facts["documents"] == 300
    assert corpus.facts["characters"] == sum(map(len, DOCUMENTS))
    sources = {name: source["documents"] for name, source in corpus.facts["sources"].items()}
    assert sources == {"a.md": 200, "b.txt": 100}
    # Batches are slices of the stream; each of them is drawn, the last one too.
    windows = np.lib.stride_tricks.sliding_window_view
    slices = {
        part: {piece.tobytes() for piece in windows(stream.astype(np.int64), 21)}
        for part, stream in streams.items()
    }
    drawn = corpus.sample(np.random.default_rng(0), 20 * len(streams["train"]))
    assert drawn.shape[1] == 21 and {row.tobytes() for row in drawn} == slices["train"]
    assert {row.tobytes() for row in corpus.held_out} <= slices["held_out"]
    ends = [streams["held_out"][:21], streams["held_out"][-21:]]
    assert np.array_equal(corpus.held_out[[0, -1]], ends)
    for length in (10**6, len(streams["held_out"])):
        says = f"has only .* held out, where a sequence takes {length + 1}"
        with pytest.raises(UserError, match=says):
            read(folder, sequence=length)


def test_the_tokenizer_is_transformers_own(folder, tmp_path):
    corpus = read(folder)
    tokenizer = Tokenizer.from_str(corpus.files["tokenizer.json"])
    for name, text in corpus.files.items():
        (tmp_path / name).write_text(text)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    unseen = "Ωmega 東京 <b> \n\n  two  spaces"  # any bytes at all
    ids = tokenizer.encode(unseen).ids
    assert theirs(unseen)["input_ids"] == ids and theirs.eos_token_id == 0
    assert tokenizer.decode(ids) == unseen
    nameless = json.dumps({**json.loads(corpus.files["tokenizer.json"]), "added_tokens": []})
    nameless = nameless.replace("<|endoftext|>", "end")
    with pytest.raises(UserError, match="no token <.endoftext.>"):
        language.language(str(folder), 20, progress=False, tokenizer=nameless)


def test_language_is_cached_and_made_again_to_the_byte(folder, monkeypatch, tmp_path):
    first, streams = read(folder), streams_in(tmp_path / "cache")
    monkeypatch.setenv("DTLIB_CACHE", str(tmp_path / "another"))
    again, others = read(folder), streams_in(tmp_path / "another")
    assert all(np.array_equal(stream, others[part]) for part, stream in streams.items())
    assert again.files == first.files and again.facts == first.facts
    moved = folder.rename(tmp_path / "moved")
    with monkeypatch.context() as patch:
        patch.setattr(language, "_tokenise", lambda *arguments: pytest.fail("not cached"))
        again = read(moved)
    assert np.array_equal(first.held_out, again.held_out)
    assert again.facts == first.facts | {"corpus": str(moved)}
    (moved / "a.md").write_text(SEPARATOR.join(DOCUMENTS[:199]))
    assert read(moved).facts["documents"] == 299


LATIN = {"a.txt": SEPARATOR.join(DOCUMENTS).encode(), "b.txt": "für".encode("latin-1")}
SIMILAR = {"a.txt": SEPARATOR.join(f"{PROSE} {i}" for i in range(99)).encode()}


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "holds no text"),
        ({"a.txt": b"", "b.png": b"x"}, "holds no text"),
        (LATIN, "b.txt is not UTF-8"),
        ({"a.txt": PROSE.encode()}, r"too little prose \(1 documents\)"),
        (SIMILAR, "yields .* tokens, not 400: more text, or"),
    ],
)
def test_folders_without_enough_text(tmp_path, cached, files, says):
    (tmp_path / "text").mkdir()
    for name, content in files.items():
        (tmp_path / "text" / name).write_bytes(content)
    with pytest.raises(UserError, match=says):
        read(tmp_path / "text")
    assert cached() == []


def test_wikitext_with_and_without_a_network(cached, monkeypatch):
    def load_dataset(*asked, split):
        assert asked == ("Salesforce/wikitext", "wikitext-2-raw-v1") and split == "train"
        lines = []
        for document in DOCUMENTS:
            lines += ["", " = Title = \n", "", f" {document} \n"]
            lines += [" = = Section = = \n", " And here some more words . \n"]
        return {"text": lines}

    broken = types.SimpleNamespace(load_dataset=lambda *asked, split: 1 / 0)
    for module in (None, broken):  # any error of a client's
        monkeypatch.setitem(sys.modules, "datasets", module)
        says = r"Could not get wikitext-2 \((ModuleNotFound|ZeroDivision)Error.*give a folder"
        with pytest.raises(UserError, match=says):
            read("wikitext-2")
    says = "Unknown corpus 'wikitext-4': expected installed, python, wikitext-2"
    with pytest.raises(UserError, match=says):
        read("wikitext-4")
    assert cached() == []
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert read("wikitext-2").facts["documents"] == len(DOCUMENTS)


def test_the_list_of_packages_is_frozen():
    """Its text decides the corpus "installed", and with it every newly made language start."""
    file = language.Path(language.__file__).with_name("installed.txt")
    names = file.read_text().split()
    assert names == sorted(set(names)) and len(names) == 106
    assert digest(file) == "5de5cb7240818f50d1015448f3e2e3baa092df1f748d598cf56dce1ba40d5c1a"
    assert {"numpy", "torch", "transformers", "jinja2"} <= set(names)
    assert not {"pytest", "datasets", "dtlib"} & set(names)
    assert not any(name.startswith(("nvidia", "cuda", "triton")) for name in names)
    found = language.installed_versions()  # on another platform some are absent
    assert list(found) == [name for name in names if name in found]
    assert found["numpy"] == np.__version__ and len(found) > 90


def test_what_every_install_has(tmp_path, monkeypatch):
    for place in ("library", "library/site-packages"):
        (tmp_path / place).mkdir()
        text = f'def f():\n    """Documented in {place} and nowhere else."""\n'
        (tmp_path / place / "a.py").write_text(text)
    python = types.SimpleNamespace(
        get_path=lambda name: str(tmp_path / "library"), get_python_version=lambda: "3"
    )
    monkeypatch.setattr(language, "sysconfig", python)
    packages = {"filelock": "1", "platformdirs": "2"}
    monkeypatch.setattr(language, "installed_versions", lambda: packages)
    sources = read("installed", 64, 500).facts["sources"]
    only = "Documented in library and nowhere else."
    assert sources.pop("Python") == {"documents": 1, "characters": len(only)}
    assert set(sources) == {"Python's reference topics", "filelock", "platformdirs"}
    assert min(source["documents"] for source in sources.values()) > 20
    sources = read("python", 64, 500).facts["sources"]
    assert set(sources) == {"Python's reference topics", "Python"}


def test_a_given_tokenizer_is_used_as_it_is(folder, tmp_path):
    (tmp_path / "other").mkdir()
    text = SEPARATOR.join(DOCUMENTS).upper()
    (tmp_path / "other" / "a.md").write_text(text)
    theirs = read(folder, 16, 300)
    given = theirs.files["tokenizer.json"]
    ours = language.language(str(tmp_path / "other"), 16, tokenizer=given, progress=False)
    assert ours.vocabulary == 300 and ours.files["tokenizer.json"] == given
    assert ours.held_out.max() < 300 and ours.facts["sha256"] != theirs.facts["sha256"]


def colours(corpus, rows):
    """The images (N, side, side, 3) that ``rows`` stand for, by the corpus's palette."""
    palette = np.array(json.loads(corpus.files["preprocessor_config.json"])["clusters"])
    assert palette.shape == (images.COLOURS, 3) and (rows[:, 0] == images.COLOURS).all()
    side = round((rows.shape[1] - 1) ** 0.5)
    return ((palette[rows[:, 1:]] + 1) * 127.5).reshape(-1, side, side, 3)


def test_photographs(monkeypatch, tmp_path):
    """Red grows to the right only in the left four fifths, and downwards too in the right one."""
    right, down, picture = np.arange(100), np.arange(40)[:, None], np.zeros((40, 100, 3), np.uint8)
    picture[..., 0] = np.where(right < 80, 3 * right + 0 * down, 6 * (right - 80) + 3 * down)
    photographs = types.SimpleNamespace(images=[picture, picture])
    monkeypatch.setattr("sklearn.datasets.load_sample_images", lambda: photographs)
    monkeypatch.setattr(images, "COLOURS", 16)
    corpus, again = images.image("photographs", 64), images.image("photographs", 64)
    assert np.array_equal(again.held_out, corpus.held_out)
    assert again.files == corpus.files and corpus.vocabulary == 16
    drawn = corpus.sample(np.random.default_rng(0), 500)
    held_out, seen = (colours(corpus, rows)[..., 0] for rows in (corpus.held_out, drawn))
    # Rows are alike in the left part (a crop read by columns would not be), and not in the right.
    assert (seen == seen[:, :1]).all() and len(held_out) == 512
    assert (held_out != held_out[:, :1]).any((1, 2)).all()
    growth = np.sign(seen[:, 0, -1] - seen[:, 0, 0])
    assert (np.diff(seen) * growth[:, None, None] >= 0).all()
    assert 200 < (growth < 0).sum() < 300  # half are mirrored
    assert (np.diff(held_out) >= 0).all()
    assert {len(np.unique(crop)) for crop in seen} >= {2, 3, 4}  # of several scales
    (tmp_path / "preprocessor_config.json").write_text(corpus.files["preprocessor_config.json"])
    processor, part = ImageGPTImageProcessorPil.from_pretrained(tmp_path), picture[:8, 3:11]
    theirs = np.insert(processor(part, return_tensors="np")["input_ids"], 0, 16, 1)
    assert np.abs(colours(corpus, theirs)[0, ..., 0] - part[..., 0]).max() < 12
    for sequence, says in ((250, "250 tokens make no square"), (441, "20 pixels wide")):
        with pytest.raises(UserError, match=says):
            images.image("photographs", sequence)


@pytest.mark.parametrize("side", [16, 32])
def test_cifar(tmp_path, monkeypatch, side):
    monkeypatch.setattr(images, "COLOURS", 16)
    generator, learnt = np.random.default_rng(0), set()
    palette = generator.integers(2, 254, (16, 3))
    # At side 16, four pixels become their mean.
    offset = np.tile([[-2, 1], [2, -1]], (16, 16)) if side == 16 else 0
    for name in [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]:
        pictures = palette[generator.integers(16, size=(4, side, side))]
        whole = pictures.repeat(32 // side, 1).repeat(32 // side, 2).transpose(0, 3, 1, 2) + offset
        content = np.hstack([generator.integers(10, size=(4, 1)), whole.reshape(4, 3072)])
        content.astype(np.uint8).tofile(tmp_path / name)
        if name != "test_batch.bin":
            learnt |= {picture.tobytes() for picture in [*pictures, *pictures[:, :, ::-1]]}
    corpus = images.image(str(tmp_path), side * side)
    held_out, seen = (
        {picture.tobytes() for picture in colours(corpus, rows).round().astype(int)}
        for rows in (corpus.held_out, corpus.sample(np.random.default_rng(0), 500))
    )
    assert held_out == {picture.tobytes() for picture in pictures} and seen == learnt
    third = tmp_path / "data_batch_3.bin"
    third.write_bytes(third.read_bytes()[:-1])
    whole = r"data_batch_3\.bin is not a whole file"
    for sequence, says in ((400, "do not shrink evenly to 20"), (side * side, whole)):
        with pytest.raises(UserError, match=says):
            images.image(str(tmp_path), sequence)
    (tmp_path / "test_batch.bin").rename(tmp_path / "test_batch")  # as the Python edition calls it
    with pytest.raises(UserError, match="pickles are not opened"):
        images.image(str(tmp_path), side * side)


def test_the_chain_is_a_softmax_of_uniform_numbers():
    matrix = synthetic.transition_matrix("markov", 3)
    uniform = np.random.default_rng(stream_seed(3, "chain")).random((100, 100))
    np.testing.assert_allclose(matrix, softmax(uniform / synthetic.TEMPERATURE, axis=1), rtol=1e-12)
    often = synthetic.stationary(matrix)
    np.testing.assert_allclose(often @ matrix, often, rtol=1e-12)
    assert np.isclose(often.sum(), 1) and np.ptp(often) > 1e-4
    rate = -sum(often[i] * matrix[i, j] * np.log(matrix[i, j]) for i, j in np.ndindex(100, 100))
    assert np.isclose(synthetic.entropy_rate(matrix), rate, atol=1e-12) and rate < np.log(100) - 0.4
    flat = synthetic.entropy_rate(synthetic.transition_matrix("markov", 3, temperature=1))
    # To second order half the variance of U[0, 1], which is 1/24.
    assert 0.035 < np.log(100) - flat < 0.045
    nothing = synthetic.entropy_rate(synthetic.transition_matrix("iid", 3))
    assert np.isclose(nothing, np.log(100), atol=1e-12)
    # The largest random number stands for a state too.
    largest = types.SimpleNamespace(random=lambda shape: np.full(shape, np.nextafter(1, 0)))
    assert (synthetic.synthetic("markov", 0, 500).sample(largest, 2) == 99).all()


def test_the_held_out_sample_has_512_sequences_or_131072_tokens():
    for sequence, count in ((128, 512), (256, 512), (1024, 128), (200_000, 1)):
        assert synthetic.synthetic("iid", 0, sequence).held_out.shape == (count, sequence + 1)


@pytest.mark.parametrize("kind", ["markov", "iid"])
def test_drawn_tokens_follow_the_chain(kind):
    corpus, matrix = synthetic.synthetic(kind, 3, 64), synthetic.transition_matrix(kind, 3)
    drawn, pairs = corpus.sample(np.random.default_rng(0), 8000), np.zeros((100, 100))
    assert drawn.shape == (8000, 65) and corpus.held_out.shape == (512, 65)
    assert corpus.vocabulary == 100
    np.add.at(pairs, (drawn[:, :-1], drawn[:, 1:]), 1)
    first = np.bincount(drawn[:, 0], minlength=100)
    expected_first = 8000 * synthetic.stationary(matrix)
    expected_pairs = pairs.sum(1, keepdims=True) * matrix
    for counts, expected in ((pairs, expected_pairs), (first, expected_first)):
        freedom = counts.size - len(np.atleast_2d(counts))
        chi_squared = ((counts - expected) ** 2 / expected).sum()
        assert abs(chi_squared - freedom) < 5 * (2 * freedom) ** 0.5
    known = -np.log(matrix[corpus.held_out[:, :-1], corpus.held_out[:, 1:]])
    assert np.isclose(corpus.facts["loss_of_the_chain_itself"], known.mean())
    # The chain's loss is the entropy rate but for chance. A bigram table's is that, and what
    # counting 9900 numbers costs.
    chance = 4 * known.std() / known.size**0.5 + 1e-12
    assert abs(known.mean() - corpus.facts["entropy_rate"]) < chance
    losses = corpus.baselines(10_000)
    assert losses["uniform"] == np.log(100) and abs(losses["unigram"] - np.log(100)) < 0.01
    assert 0 < losses["bigram"] - known.mean() < 3 * 9900 / (2 * 10_000 * 64)


def test_baselines_by_brute_force():
    """Token 5, then 3 × 3 pixels of 5 colours, one of which is only in the held-out sample."""

    def sample(generator, count):
        pixels = generator.integers(4, size=(count, 9)) * generator.integers(2, size=(count, 1))
        return np.insert(pixels, 0, 5, 1)

    held_out = np.insert(np.random.default_rng(1).integers(5, size=(30, 9)), 0, 5, 1)
    losses = Corpus(5, sample, held_out, {"side": 3}, {}).baselines(25)
    drawn = sample(np.random.default_rng(stream_seed(0, "baselines")), 25)
    unigram = [((drawn[:, 1:] == token).sum() + 1) / (25 * 9 + 5) for token in range(5)]
    alone = -np.mean([np.log(unigram[token]) for token in held_out[:, 1:].ravel()])
    expected = {"uniform": np.log(5), "unigram": alone}
    for name, back in (("bigram", 1), ("pixel above", 3)):
        seen, asked = (
            [(row[max(i - back, 0)], row[i]) for row in rows.tolist() for i in range(1, 10)]
            for rows in (drawn, held_out)
        )
        chances = np.empty((6, 5))
        for context, token in np.ndindex(6, 5):
            after = [second for first, second in seen if first == context]
            share = max(after.count(token) - 0.75, 0) + 0.75 * len(set(after)) * unigram[token]
            chances[context, token] = share / len(after) if after else unigram[token]
        assert np.allclose(chances.sum(1), 1)
        expected[name] = -np.mean([np.log(chances[pair]) for pair in asked])
    assert losses == pytest.approx(expected, abs=1e-12) and len(set(losses.values())) == 4
