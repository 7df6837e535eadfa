"""What starting points learn from: nothing executed, nothing held out that is also learnt, baselines by brute force."""

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

from dtlib import corpora
from dtlib.errors import UserError
from dtlib.seeding import stream_seed

PROSE = "Return the sum of all of the numbers, or zero if there are none."
WORDS = ["".join(random.Random(i).choices("abcdefghijklmnopqrstuvwxyzäé", k=2 + i % 8)) for i in range(400)]
DOCUMENTS = [f"Document {i}: {' '.join(random.Random(f'{i}').choices(WORDS, k=30))} “{i}” naïve…\n\tend ☃" for i in range(300)]
CODE, LICENCE = "x = f(a, b)[0] + {1: 2}; y = g(c, d)[1] - {3: 4}", PROSE + " Permission is hereby GRANTED, free of charge."


@pytest.fixture(autouse=True)
def cached(tmp_path, monkeypatch):
    """A cache of the test's own; call it for the files in there."""
    monkeypatch.setenv("DTLIB_CACHE", str(tmp_path / "cache"))
    return lambda: [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def language(corpus, sequence=20, vocabulary=400):
    return corpora.language(str(corpus), sequence, vocabulary, progress=False)


@pytest.fixture
def folder(tmp_path):
    """300 documents in two files, and what must not be learnt: a licence, code, and each third document once more."""
    others = [f"\n  {document.replace(' ', '   ')}" for document in DOCUMENTS[::3]]
    (tmp_path / "text" / "deeper.md").mkdir(parents=True)  # a folder, whatever its name says
    (tmp_path / "text" / "deeper.md" / "b.txt").write_text("\n\n\n".join(DOCUMENTS[200:] + others + [CODE, LICENCE]))
    (tmp_path / "text" / "a.md").write_text("\n\n\n".join(DOCUMENTS[:200]))
    (tmp_path / "text" / "c.py").write_text(PROSE)  # of another kind
    return tmp_path / "text"


def test_docstrings_are_read_without_executing_and_prose_is_chosen(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(f'"""A module."""\nopen({str(tmp_path / "executed")!r}, "w")\nclass A:\n    """A class."""\n'
                    '    async def f(self):\n        """A\n        method.\n        """\n        return "no docstring"\n')
    assert corpora.docstrings(path) == ["A module.", "A class.", "A\nmethod."]
    assert corpora.docstrings(tmp_path / "absent.py") == [] and not (tmp_path / "executed").exists()
    for code in (b"print 'Python 2'", b"\xff\xfe", b"x = '\0'", b"x = " + b"-" * 10**6 + b"1", b"x = a" + b".a" * 10**5):
        path.write_bytes(b'"""A module."""\n' + code)
        assert corpora.docstrings(path) == []  # it does not parse, or is nested too deeply
    texts = [PROSE, "Ein Satz auf Deutsch, für fünf Wörter.", "Too short to say.", CODE, LICENCE]
    assert [corpora.is_prose(text) for text in texts] == [True, True, False, False, False]


def test_language_of_a_folder(folder, cached, tmp_path):
    corpus = language(folder)
    streams, tokenizer = load_file(*cached()), Tokenizer.from_str(corpus.files["tokenizer.json"])
    assert tokenizer.get_vocab_size() == corpus.vocabulary == 400 > max(stream.max() for stream in streams.values())
    train, held_out = ([tokenizer.decode(piece.tolist()) for piece in np.split(stream[:-1], np.flatnonzero(stream[:-1] == 0))]
                       for stream in (streams["train"], streams["held_out"]))
    # Every document once, to the byte; none of what must not be learnt; none in both parts.
    assert collections.Counter(train + held_out) == collections.Counter(DOCUMENTS) and 5 <= len(held_out) <= 30
    assert corpus.facts["documents"] == 300 and corpus.facts["characters"] == sum(map(len, DOCUMENTS))
    assert {name: source["documents"] for name, source in corpus.facts["sources"].items()} == {"a.md": 200, "b.txt": 100}
    # Batches are slices of the stream; each of them is drawn, the last one too.
    slices = {part: {piece.tobytes() for piece in np.lib.stride_tricks.sliding_window_view(stream.astype(np.int64), 21)}
              for part, stream in streams.items()}
    drawn = corpus.sample(np.random.default_rng(0), 20 * len(streams["train"]))
    assert drawn.shape[1] == 21 and {row.tobytes() for row in drawn} == slices["train"]
    assert {row.tobytes() for row in corpus.held_out} <= slices["held_out"]
    assert np.array_equal(corpus.held_out[[0, -1]], [streams["held_out"][:21], streams["held_out"][-21:]])
    for name, text in corpus.files.items():
        (tmp_path / name).write_text(text)
    theirs, unseen = AutoTokenizer.from_pretrained(tmp_path), "Ωmega 東京 <b> \n\n  two  spaces"  # any bytes at all
    assert theirs(unseen)["input_ids"] == (ids := tokenizer.encode(unseen).ids) and theirs.eos_token_id == 0
    assert tokenizer.decode(ids) == unseen
    for length in (10**6, len(streams["held_out"])):
        with pytest.raises(UserError, match=f"has only .* held out, where a sequence takes {length + 1}"):
            language(folder, sequence=length)
    nameless = json.dumps({**json.loads(corpus.files["tokenizer.json"]), "added_tokens": []}).replace("<|endoftext|>", "end")
    with pytest.raises(UserError, match="no token <.endoftext.>"):
        corpora.language(str(folder), 20, progress=False, tokenizer=nameless)


def test_language_is_cached_and_made_again_to_the_byte(folder, cached, monkeypatch, tmp_path):
    first, streams = language(folder), load_file(*cached())
    monkeypatch.setenv("DTLIB_CACHE", str(tmp_path / "another"))
    again, others = language(folder), load_file(*(tmp_path / "another" / "corpora").iterdir())
    assert all(np.array_equal(stream, others[part]) for part, stream in streams.items())
    assert again.files == first.files and again.facts == first.facts
    moved = folder.rename(tmp_path / "moved")
    with monkeypatch.context() as patch:
        patch.setattr(corpora, "_tokenise", lambda *arguments: pytest.fail("not cached"))
        again = language(moved)
    assert np.array_equal(first.held_out, again.held_out) and again.facts == first.facts | {"corpus": str(moved)}
    (moved / "a.md").write_text("\n\n\n".join(DOCUMENTS[:199]))
    assert language(moved).facts["documents"] == 299


@pytest.mark.parametrize(("files", "says"), [
    ({}, "holds no text"),
    ({"a.txt": b"", "b.png": b"x"}, "holds no text"),
    ({"a.txt": "\n\n\n".join(DOCUMENTS).encode(), "b.txt": "für".encode("latin-1")}, "b.txt is not UTF-8"),
    ({"a.txt": PROSE.encode()}, r"too little prose \(1 documents\)"),
    ({"a.txt": "\n\n\n".join(f"{PROSE} {i}" for i in range(99)).encode()}, "yields .* tokens, not 400: more text, or"),
])
def test_folders_without_enough_text(tmp_path, cached, files, says):
    (tmp_path / "text").mkdir()
    for name, content in files.items():
        (tmp_path / "text" / name).write_bytes(content)
    with pytest.raises(UserError, match=says):
        language(tmp_path / "text")
    assert cached() == []


def test_wikitext_with_and_without_a_network(cached, monkeypatch):
    def load_dataset(*asked, split):
        assert asked == ("Salesforce/wikitext", "wikitext-2-raw-v1") and split == "train"
        return {"text": [line for document in DOCUMENTS for line in (
            "", " = Title = \n", "", f" {document} \n", " = = Section = = \n", " And here some more words . \n")]}
    for module in (None, types.SimpleNamespace(load_dataset=lambda *asked, split: 1 / 0)):  # any error of a client's
        monkeypatch.setitem(sys.modules, "datasets", module)
        with pytest.raises(UserError, match=r"Could not get wikitext-2 \((ModuleNotFound|ZeroDivision)Error.*give a folder"):
            language("wikitext-2")
    with pytest.raises(UserError, match="Unknown corpus 'wikitext-4': expected installed, python, wikitext-2"):
        language("wikitext-4")
    assert cached() == []
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert language("wikitext-2").facts["documents"] == len(DOCUMENTS)


def test_what_every_install_has(tmp_path, monkeypatch):
    required = corpora._required()
    assert required == sorted(required) and {"numpy", "torch", "transformers", "jinja2"} <= set(required)
    assert not {"pytest", "datasets", "dtlib"} & set(required) and not any(name.startswith("nvidia") for name in required)
    for place in ("library", "library/site-packages"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "a.py").write_text('def f():\n    """Documented in ' + place + ' and nowhere else."""\n')
    monkeypatch.setattr(corpora, "_required", lambda: ["filelock", "platformdirs"])
    monkeypatch.setattr(corpora, "sysconfig", types.SimpleNamespace(
        get_path=lambda name: str(tmp_path / "library"), get_python_version=lambda: "3"))
    sources = language("installed", 64, 500).facts["sources"]
    assert sources.pop("Python") == {"documents": 1, "characters": len("Documented in library and nowhere else.")}
    assert set(sources) == {"Python's reference topics", "filelock", "platformdirs"}
    assert min(source["documents"] for source in sources.values()) > 20
    assert set(language("python", 64, 500).facts["sources"]) == {"Python's reference topics", "Python"}


def test_a_given_tokenizer_is_used_as_it_is(folder, cached, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.md").write_text("\n\n\n".join(text.upper() for text in DOCUMENTS))
    theirs = language(folder, 16, 300)
    ours = corpora.language(str(tmp_path / "other"), 16, tokenizer=theirs.files["tokenizer.json"], progress=False)
    assert ours.vocabulary == 300 and ours.files["tokenizer.json"] == theirs.files["tokenizer.json"]
    assert ours.held_out.max() < 300 and ours.facts["sha256"] != theirs.facts["sha256"]


def colours(corpus, rows):
    """The images (N, side, side, 3) that ``rows`` stand for, by the palette that belongs to them."""
    palette = np.array(json.loads(corpus.files["preprocessor_config.json"])["clusters"])
    assert palette.shape == (corpora.COLOURS, 3) and (rows[:, 0] == corpora.COLOURS).all()
    side = round((rows.shape[1] - 1) ** 0.5)
    return ((palette[rows[:, 1:]] + 1) * 127.5).reshape(-1, side, side, 3)


def test_photographs(monkeypatch, tmp_path):
    """Red grows to the right only in the left four fifths, and downwards too in the right one."""
    right, down, picture = np.arange(100), np.arange(40)[:, None], np.zeros((40, 100, 3), np.uint8)
    picture[..., 0] = np.where(right < 80, 3 * right + 0 * down, 6 * (right - 80) + 3 * down)
    monkeypatch.setattr("sklearn.datasets.load_sample_images", lambda: types.SimpleNamespace(images=[picture, picture]))
    monkeypatch.setattr(corpora, "COLOURS", 16)
    corpus, again = corpora.image("photographs", 64), corpora.image("photographs", 64)
    assert np.array_equal(again.held_out, corpus.held_out) and again.files == corpus.files and corpus.vocabulary == 16
    drawn = corpus.sample(np.random.default_rng(0), 500)
    held_out, seen = (colours(corpus, rows)[..., 0] for rows in (corpus.held_out, drawn))
    assert (seen == seen[:, :1]).all()  # rows are alike in the left part; a crop read by columns would not be
    assert (held_out != held_out[:, :1]).any((1, 2)).all() and len(held_out) == 512  # and differ in the right one
    growth = np.sign(seen[:, 0, -1] - seen[:, 0, 0])
    assert (np.diff(seen) * growth[:, None, None] >= 0).all() and 200 < (growth < 0).sum() < 300  # half are mirrored
    assert (np.diff(held_out) >= 0).all() and {len(np.unique(crop)) for crop in seen} >= {2, 3, 4}  # of several scales
    (tmp_path / "preprocessor_config.json").write_text(corpus.files["preprocessor_config.json"])
    theirs = ImageGPTImageProcessorPil.from_pretrained(tmp_path)(picture[:8, 3:11], return_tensors="np")["input_ids"]
    assert np.abs(colours(corpus, np.insert(theirs, 0, 16, 1))[0, ..., 0] - picture[:8, 3:11, 0]).max() < 12
    for sequence, says in ((250, "250 tokens make no square"), (441, "20 pixels wide")):
        with pytest.raises(UserError, match=says):
            corpora.image("photographs", sequence)


@pytest.mark.parametrize("side", [16, 32])
def test_cifar(tmp_path, monkeypatch, side):
    monkeypatch.setattr(corpora, "COLOURS", 16)
    generator, learnt = np.random.default_rng(0), set()
    palette = generator.integers(2, 254, (16, 3))
    for name in [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]:
        images = palette[generator.integers(16, size=(4, side, side))]
        whole = images.repeat(32 // side, 1).repeat(32 // side, 2).transpose(0, 3, 1, 2)
        whole = whole + (np.tile([[-2, 1], [2, -1]], (16, 16)) if side == 16 else 0)  # four pixels become their mean
        np.hstack([generator.integers(10, size=(4, 1)), whole.reshape(4, 3072)]).astype(np.uint8).tofile(tmp_path / name)
        learnt |= {image.tobytes() for image in [*images, *images[:, :, ::-1]] if name != "test_batch.bin"}
    corpus = corpora.image(str(tmp_path), side * side)
    held_out, seen = ({image.tobytes() for image in colours(corpus, rows).round().astype(int)}
                      for rows in (corpus.held_out, corpus.sample(np.random.default_rng(0), 500)))
    assert held_out == {image.tobytes() for image in images} and seen == learnt
    (tmp_path / "data_batch_3.bin").write_bytes((tmp_path / "data_batch_3.bin").read_bytes()[:-1])
    for sequence, says in ((400, "do not shrink evenly to 20"), (side * side, r"data_batch_3\.bin is not a whole file")):
        with pytest.raises(UserError, match=says):
            corpora.image(str(tmp_path), sequence)
    (tmp_path / "test_batch.bin").rename(tmp_path / "test_batch")  # as the Python edition calls it
    with pytest.raises(UserError, match="pickles, which are not opened"):
        corpora.image(str(tmp_path), side * side)


def test_the_chain_is_a_softmax_of_uniform_numbers():
    matrix = corpora.transition_matrix("markov", 3)
    uniform, often = np.random.default_rng(stream_seed(3, "chain")).random((100, 100)), corpora.stationary(matrix)
    np.testing.assert_allclose(matrix, softmax(uniform / corpora.TEMPERATURE, axis=1), rtol=1e-12)
    np.testing.assert_allclose(often @ matrix, often, rtol=1e-12)
    assert np.isclose(often.sum(), 1) and np.ptp(often) > 1e-4
    rate = -sum(often[i] * matrix[i, j] * np.log(matrix[i, j]) for i, j in np.ndindex(100, 100))
    assert np.isclose(corpora.entropy_rate(matrix), rate, atol=1e-12) and rate < np.log(100) - 0.4
    flat = corpora.entropy_rate(corpora.transition_matrix("markov", 3, temperature=1))
    assert 0.035 < np.log(100) - flat < 0.045  # to second order the variance of U[0, 1] by two, 1/24
    assert np.isclose(corpora.entropy_rate(corpora.transition_matrix("iid", 3)), np.log(100), atol=1e-12)
    largest = types.SimpleNamespace(random=lambda shape: np.full(shape, np.nextafter(1, 0)))
    assert (corpora.synthetic("markov", 0, 500).sample(largest, 2) == 99).all()  # the largest random number is a state too


def test_the_held_out_sample_has_512_sequences_or_131072_tokens():
    for sequence, count in ((128, 512), (256, 512), (1024, 128), (200_000, 1)):
        assert corpora.synthetic("iid", 0, sequence).held_out.shape == (count, sequence + 1)


@pytest.mark.parametrize("kind", ["markov", "iid"])
def test_drawn_tokens_follow_the_chain(kind):
    corpus, matrix = corpora.synthetic(kind, 3, 64), corpora.transition_matrix(kind, 3)
    drawn, pairs = corpus.sample(np.random.default_rng(0), 8000), np.zeros((100, 100))
    assert drawn.shape == (8000, 65) and corpus.held_out.shape == (512, 65) and corpus.vocabulary == 100
    np.add.at(pairs, (drawn[:, :-1], drawn[:, 1:]), 1)
    first = np.bincount(drawn[:, 0], minlength=100)
    for counts, expected in ((pairs, pairs.sum(1, keepdims=True) * matrix), (first, 8000 * corpora.stationary(matrix))):
        freedom = counts.size - len(np.atleast_2d(counts))
        assert abs(((counts - expected) ** 2 / expected).sum() - freedom) < 5 * (2 * freedom) ** 0.5  # chi-squared
    known = -np.log(matrix[corpus.held_out[:, :-1], corpus.held_out[:, 1:]])
    assert np.isclose(corpus.facts["loss_of_the_chain_itself"], known.mean())
    # The chain's loss is the entropy rate but for chance, and a bigram table's that and what counting 9900 numbers costs.
    assert abs(known.mean() - corpus.facts["entropy_rate"]) < 4 * known.std() / known.size ** 0.5 + 1e-12
    losses = corpus.baselines(10_000)
    assert losses["uniform"] == np.log(100) and abs(losses["unigram"] - np.log(100)) < 0.01
    assert 0 < losses["bigram"] - known.mean() < 3 * 9900 / (2 * 10_000 * 64)


def test_baselines_by_brute_force():
    """Sequences of 3 × 3 pixels of 5 colours, one of which is held out only, after a token 5 that begins each."""
    def sample(generator, count):
        return np.insert(generator.integers(4, size=(count, 9)) * generator.integers(2, size=(count, 1)), 0, 5, 1)
    held_out = np.insert(np.random.default_rng(1).integers(5, size=(30, 9)), 0, 5, 1)
    losses = corpora.Corpus(5, sample, held_out, {"side": 3}, {}).baselines(25)
    drawn = sample(np.random.default_rng(stream_seed(0, "baselines")), 25)
    unigram = [((drawn[:, 1:] == token).sum() + 1) / (25 * 9 + 5) for token in range(5)]
    expected = {"uniform": np.log(5), "unigram": -np.mean([np.log(unigram[token]) for token in held_out[:, 1:].ravel()])}
    for name, back in (("bigram", 1), ("pixel above", 3)):
        seen, asked = ([(row[max(i - back, 0)], row[i]) for row in rows.tolist() for i in range(1, 10)]
                       for rows in (drawn, held_out))
        chances = np.empty((6, 5))
        for context, token in np.ndindex(6, 5):
            after = [second for first, second in seen if first == context]
            share = max(after.count(token) - 0.75, 0) + 0.75 * len(set(after)) * unigram[token]
            chances[context, token] = share / len(after) if after else unigram[token]
        assert np.allclose(chances.sum(1), 1)
        expected[name] = -np.mean([np.log(chances[pair]) for pair in asked])
    assert losses == pytest.approx(expected, abs=1e-12) and len(set(losses.values())) == 4
