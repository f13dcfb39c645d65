"""Texts are cut into the pieces that the original's tokenizers give."""
# ruff: noqa: RUF001

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vit_jax.errors import UserError
from vit_jax.tokenizers import SentencePieceTokenizer, WordPieceTokenizer, open_tokenizer

_PIECES = """
[PAD] [UNK] [CLS] [SEP] [MASK] a b c d e f i n s t ! " # $ ' ( ) * + , - . / : ; < = > ? @ [ \\ ] ^
_ ` { | } ~ the photo of cat dog cats un ##aff ##able ##s ##ing strass ##e cafe naive re ##sume
office 20 ##23 1 ##2 ##⁄ ##a ##b ##t ##i ##n ¡ … — “ ” 。 、 中 文 日 本 ᄒ ##ᅡ ##ᆫ α ##ι я ß € kg
"""
VOCABULARY = _PIECES.split()

# What tensorflow_text 2.21.1 makes of them: BertTokenizer(vocabulary, lower_case=True).
TENSORFLOW_TEXT = {
    "A Photo OF THE CAT": "a photo of the cat",
    "unaffable cats": "un ##aff ##able cats",
    "unaffing dogz": "un ##aff ##ing [UNK]",
    "na\u00efve Caf\u00e9": "naive cafe",
    "nai\u0308ve cafe\u0301": "naive cafe",
    "r\u00e9sum\u00e9": "re ##sume",
    "Stra\u00dfe STRASSE": "strass ##e strass ##e",
    "o\ufb03ce": "office",
    "\uff21 \uff43\uff41\uff54\uff0c": "a cat ,",
    "a\xa0photo\u3000of\tthe\r\ncat": "a photo of the cat",
    "ca\xadt ca\u200bt ca\u200dt": "cat cat cat",
    "a\x00b\x7fc": "a b c",
    "a\u2028b": "[UNK]",
    "cat's (dog)-[cat]": "cat ' s ( dog ) - [ cat ]",
    "$20+a=b<c>^`|~": "$ 20 + a = b < c > ^ ` | ~",
    "20-2023": "20 - 20 ##23",
    "\u00bd \u338f \u2460": "1 ##⁄ ##2 kg 1",
    "日本の中文": "日 本 [UNK] 中 文",
    "a日b": "a 日 b",
    "\ud55c": "ᄒ ##ᅡ ##ᆫ",
    "\u1fb3 \u0391\u03b9": "α ##ι α ##ι",
    "\u0130 \u0131": "i [UNK]",
    "Я": "я",
    "€ a€b": "€ [UNK]",
    "“cat”…\u00a1dog—": "“ cat ” . . . ¡ dog —",
    "cat👍 👍": "[UNK] [UNK]",
    "a" * 100: "a" + " ##a" * 99,
    "a" * 101: "[UNK]",
    "\u00e9" * 100: "e" + " ##e" * 99,
    "ж" * 50 + " cat": "[UNK] cat",
    "[CLS] [MASK]": "[ [UNK] ] [ [UNK] ]",
    "##s": "# # s",
    " ": "",
    "": "",
}


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory):
    path = tmp_path_factory.mktemp("wordpiece") / "vocab.txt"
    path.write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("text", TENSORFLOW_TEXT, ids=lambda text: ascii(text)[:40])
def test_words_become_the_pieces_of_tensorflow_text(vocabulary, text):
    row = WordPieceTokenizer(vocabulary, max_len=128)([text])[0]
    pieces = " ".join(VOCABULARY[i] for i in row if i)
    assert pieces == f"[CLS] {TENSORFLOW_TEXT[text]}".strip()


def test_tokens_are_sixteen_numbers_starting_with_cls_and_padded_with_zeros(vocabulary):
    tokens = WordPieceTokenizer(vocabulary)(["the cat", "a " * 30, ""])
    the, cat, a, cls = map(VOCABULARY.index, ("the", "cat", "a", "[CLS]"))
    assert tokens.dtype == np.int32
    np.testing.assert_array_equal(tokens[0], [cls, the, cat] + [0] * 13)
    np.testing.assert_array_equal(tokens[1], [cls] + [a] * 15)
    np.testing.assert_array_equal(tokens[2], [cls] + [0] * 15)


def test_a_word_may_be_cut_in_its_middle(vocabulary):
    tokens = WordPieceTokenizer(vocabulary, max_len=3)(["unaffable"])
    assert [VOCABULARY[i] for i in tokens[0]] == ["[CLS]", "un", "##aff"]


# Where Unicode's compatibility forms and invisible characters are left out, all of BERT's
# tokenizers agree.
_COMMON = "abcdefgimnostu ABCDEÉéüñçåØ日本中文한αβяЖ!?#$%&'()*+,-./:;<=>@[]^_`{|}~“”—¡¿€👍1290\t\n"


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from(_COMMON), max_size=40))
def test_hugging_face_tokenizers_agree(vocabulary, text):
    tokenizers = pytest.importorskip("tokenizers")
    reference = tokenizers.BertWordPieceTokenizer(str(vocabulary), lowercase=True)
    expected = reference.encode(text, add_special_tokens=False).ids
    tokens = WordPieceTokenizer(vocabulary, max_len=128)([text])[0]
    assert [i for i in tokens[1:] if i] == expected


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(max_size=30), max_size=4))
def test_any_text_has_tokens(vocabulary, texts):
    tokens = WordPieceTokenizer(vocabulary)(texts)
    assert tokens.shape == (len(texts), 16)
    assert np.all(tokens[:, 0] == VOCABULARY.index("[CLS]"))
    # Zeros only at the end: nothing after the padding is taken for a word.
    assert np.all(np.diff((tokens > 0).astype(int), axis=1) <= 0)


def test_half_a_character_is_an_unknown_word(vocabulary):
    tokens = WordPieceTokenizer(vocabulary)(["\ud800 cat"])[0]
    assert [VOCABULARY[i] for i in tokens[:3]] == ["[CLS]", "[UNK]", "cat"]


def test_a_vocabulary_written_on_windows_is_the_same(vocabulary, tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_bytes("\r\n".join(VOCABULARY).encode())
    texts = list(TENSORFLOW_TEXT)
    np.testing.assert_array_equal(
        WordPieceTokenizer(path)(texts), WordPieceTokenizer(vocabulary)(texts)
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"cat\ndog\n", r"no WordPiece vocabulary: expected a line \[CLS\]"),
        (b"", r"no WordPiece vocabulary: expected a line \[CLS\]"),
        (b"[CLS]\ncat\n", r"expected a line \[UNK\]"),
        (b"\xff\xfe\x00", "is no text .*expected a WordPiece vocabulary"),
    ],
)
def test_a_file_that_is_no_wordpiece_vocabulary_is_named(tmp_path, content, message):
    path = tmp_path / "words.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"words\.txt .*{message}"):
        WordPieceTokenizer(path)


@pytest.mark.parametrize("name", ["none.txt", "none.model"])
def test_a_missing_vocabulary_is_named(tmp_path, name):
    pytest.importorskip("sentencepiece")
    with pytest.raises(UserError, match=rf"{name}: can't be read \(No such file"):
        open_tokenizer(tmp_path / name)


def test_a_text_in_place_of_a_list_is_refused(vocabulary):
    with pytest.raises(UserError, match=r"write tokenizer\(\[text\]\)"):
        WordPieceTokenizer(vocabulary)("a cat")


# SentencePiece.

SENTENCES = ["a photo of a cat", "a photo of the dog", "two cats and three dogs on a lawn"] * 30


def train(folder, **options):
    sentencepiece = pytest.importorskip("sentencepiece")
    path = folder / "pieces.model"
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(SENTENCES),
            model_writer=file,
            vocab_size=40,
            hard_vocab_limit=False,
            minloglevel=2,
            **options,
        )
    return path, sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train(tmp_path_factory.mktemp("sentencepiece"))


@pytest.mark.parametrize("text", ["a cat", "two dogs, three cats", "", "日本👍", "  a   photo "])
def test_a_short_text_is_its_pieces_and_then_ends(trained, text):
    path, reference = trained
    tokens = SentencePieceTokenizer(path, max_len=40)([text])
    pieces = reference.encode(text)
    assert tokens.dtype == np.int32
    assert tokens[0].tolist() == pieces + [reference.eos_id()] * (40 - len(pieces))


def test_a_long_text_is_cut_to_fifteen_pieces_and_ends_too(trained):
    path, reference = trained
    text = "a photo of a cat and a dog " * 5
    tokens = SentencePieceTokenizer(path)([text, "a"])
    assert tokens.shape == (2, 16)
    assert tokens[0].tolist() == [*reference.encode(text)[:15], reference.eos_id()]
    assert np.all(tokens[:, -1] == reference.eos_id())


def test_half_a_character_counts_as_a_character_that_nobody_knows(trained):
    path, reference = trained
    tokens = SentencePieceTokenizer(path)(["\udcff cat"])[0]
    pieces = reference.encode("\ufffd cat")
    assert tokens[: len(pieces)].tolist() == pieces


def test_a_model_without_an_end_of_text_is_refused(tmp_path):
    path, _ = train(tmp_path, eos_id=-1)
    with pytest.raises(UserError, match=r"pieces\.model has no piece </s>"):
        SentencePieceTokenizer(path)


@pytest.mark.parametrize("content", [b"", b"[CLS]\n[UNK]\ncat\n"], ids=["empty", "words"])
def test_a_file_that_is_no_sentencepiece_model_is_named(tmp_path, content):
    pytest.importorskip("sentencepiece")
    path = tmp_path / "words.model"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"words\.model is no SentencePiece model"):
        SentencePieceTokenizer(path)


@pytest.mark.parametrize(("package", "ending"), [("sentencepiece", "model"), ("tokenizers", "txt")])
def test_without_its_package_one_line_says_what_to_do(tmp_path, monkeypatch, package, ending):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"words need it: pip install {package}$"):
        open_tokenizer(tmp_path / f"pieces.{ending}")


def test_the_name_of_a_vocabulary_says_which_tokenizer_reads_it(vocabulary, trained, tmp_path):
    assert isinstance(open_tokenizer(vocabulary), WordPieceTokenizer)
    assert isinstance(open_tokenizer(str(trained[0]), max_len=8), SentencePieceTokenizer)
    assert open_tokenizer(trained[0], max_len=8)(["a"]).shape == (1, 8)
    with pytest.raises(UserError, match=r"expected a name in \.txt \(WordPiece\) or \.model"):
        open_tokenizer(tmp_path / "vocabulary.json")
