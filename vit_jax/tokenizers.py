"""From texts to the numbers that a text tower reads: the two tokenizers of LiT.

Both give int32 arrays (n, max_len); the vocabulary is a file that is published beside the weights.
"""

import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vit_jax.errors import UserError

MAX_LEN = 16  # Tokens in a text of the published LiT models.

_MAX_BYTES = 100  # A longer word is unknown.

# Each character in these ranges is a word of its own (arXiv:1810.04805's code): CJK ideographs.
_IDEOGRAPHS = (
    (0x4E00, 0x9FFF),
    (0x3400, 0x4DBF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F),
    (0x2B820, 0x2CEAF),
    (0xF900, 0xFAFF),
    (0x2F800, 0x2FA1F),
)

# Unicode's Default_Ignorable_Code_Point: soft hyphens, joiners, variation selectors and the like.
_IGNORABLE = {
    code: None
    for first, last in (
        (0x00AD, 0x00AD),
        (0x034F, 0x034F),
        (0x061C, 0x061C),
        (0x115F, 0x1160),
        (0x17B4, 0x17B5),
        (0x180B, 0x180F),
        (0x200B, 0x200F),
        (0x202A, 0x202E),
        (0x2060, 0x206F),
        (0x3164, 0x3164),
        (0xFE00, 0xFE0F),
        (0xFEFF, 0xFEFF),
        (0xFFA0, 0xFFA0),
        (0xFFF0, 0xFFF8),
        (0x1BCA0, 0x1BCA3),
        (0x1D173, 0x1D17A),
        (0xE0000, 0xE0FFF),
    )
    for code in range(first, last + 1)
}


class WordPieceTokenizer:
    """BERT's lower-casing tokenizer: [CLS], then the pieces of each word, then zeros.

    It gives what TensorFlow Text's BertTokenizer gives, which the original uses: text is case
    folded and put into compatibility form (Unicode's NFKC_Casefold), accents are dropped, words
    end at spaces, and punctuation marks and ideographs are words of their own. A word is cut into
    the longest pieces of the vocabulary from left to right; if that fails, or the word is longer
    than 100 bytes, it is [UNK].

    Args:
      vocab_path: a text file of UTF-8, one piece a line; those that continue a word start with ##.
      max_len: number of tokens to cut or pad to.

    Raises UserError if the file can't be read or is no such vocabulary.
    """

    def __init__(self, vocab_path: str | os.PathLike, max_len: int = MAX_LEN) -> None:
        pieces = _decode(_read(vocab_path), vocab_path).split("\n")
        self._ids = {piece.rstrip("\r"): i for i, piece in enumerate(pieces) if piece}
        for needed in ("[CLS]", "[UNK]"):
            if needed not in self._ids:
                raise UserError(
                    f"{vocab_path} is no WordPiece vocabulary: expected a line {needed} "
                    "among one piece a line; give the .txt published beside the weights"
                )
        self.max_len = max_len

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Token ids of texts, int32 (n, max_len); longer texts are cut."""
        _check(texts)
        tokens = np.zeros((len(texts), self.max_len), np.int32)
        for row, text in zip(tokens, texts, strict=True):
            ids = [self._ids["[CLS]"]]
            for word in _words(text):
                if len(ids) >= self.max_len:
                    break
                ids += self._pieces(word)
            row[: len(ids)] = ids[: self.max_len]
        return tokens

    def _pieces(self, word: str) -> list[int]:
        unknown = [self._ids["[UNK]"]]
        if len(word.encode("utf-8", "surrogatepass")) > _MAX_BYTES:
            return unknown
        ids: list[int] = []
        start = 0
        while start < len(word):
            prefix = "##" if start else ""
            for end in range(len(word), start, -1):
                piece = self._ids.get(prefix + word[start:end])
                if piece is not None:
                    break
            else:
                return unknown
            ids.append(piece)
            start = end
        return ids


class SentencePieceTokenizer:
    """SentencePiece (Kudo and Richardson, arXiv:1808.06226) with </s> at the end and as padding.

    Texts are cut one token short of `max_len`, so that the last token is </s> for every text: it
    is the one whose output stands for the text.

    Args:
      model_path: a SentencePiece .model file.
      max_len: number of tokens to cut or pad to.

    Raises UserError if the package `sentencepiece` is missing, or if the file can't be read or is
    no such model.
    """

    def __init__(self, model_path: str | os.PathLike, max_len: int = MAX_LEN) -> None:
        try:
            import sentencepiece
        except ImportError as error:
            raise UserError(
                "the package sentencepiece is not installed, and this text tower's words need it: "
                "pip install sentencepiece"
            ) from error
        self._processor = sentencepiece.SentencePieceProcessor()
        content = _read(model_path)
        try:
            self._processor.LoadFromSerializedProto(content)
        except RuntimeError as error:
            raise UserError(
                f"{model_path} is no SentencePiece model ({error}): give the .model published "
                "beside the weights"
            ) from error
        self._end = self._processor.piece_to_id("</s>")
        if self._processor.id_to_piece(self._end) != "</s>":
            raise UserError(
                f"{model_path} has no piece </s>, expected it for the end of a text: "
                "give the .model published beside the weights"
            )
        self.max_len = max_len

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Token ids of texts, int32 (n, max_len); longer texts are cut."""
        _check(texts)
        tokens = np.full((len(texts), self.max_len), self._end, np.int32)
        for row, text in zip(tokens, texts, strict=True):
            # The package refuses half a surrogate pair, which file names may hold.
            whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            ids = self._processor.encode(whole)[: self.max_len - 1]
            row[: len(ids)] = ids
        return tokens


def open_tokenizer(
    path: str | os.PathLike, max_len: int = MAX_LEN
) -> WordPieceTokenizer | SentencePieceTokenizer:
    """The tokenizer of a vocabulary file: .txt is WordPiece, .model is SentencePiece.

    Raises UserError for another name, or if the file can't be used.
    """
    kinds: dict[str, type[WordPieceTokenizer] | type[SentencePieceTokenizer]] = {
        ".txt": WordPieceTokenizer,
        ".model": SentencePieceTokenizer,
    }
    suffix = Path(path).suffix
    if suffix not in kinds:
        raise UserError(
            f"can't tell what vocabulary {path} is: expected a name in .txt (WordPiece) or .model "
            "(SentencePiece)"
        )
    return kinds[suffix](path, max_len)


def _words(text: str) -> list[str]:
    words, word = [], ""
    for character in _fold(text):
        alone = _is_punctuation(character) or _is_ideograph(character)
        if not (alone or _is_space(character)):
            word += character
            continue
        if word:
            words.append(word)
            word = ""
        if alone:
            words.append(character)
    return [*words, word] if word else words


def _fold(text: str) -> str:
    """Without case, accents and differences that are only of looks; decomposed (NFD)."""
    # Folding may give characters that can be decomposed and the other way round, but not twice.
    text = unicodedata.normalize("NFKD", text.translate(_IGNORABLE)).casefold()
    text = unicodedata.normalize("NFKD", text).casefold().translate(_IGNORABLE)
    text = unicodedata.normalize("NFD", text)
    return "".join(c for c in text if unicodedata.category(c) != "Mn")


def _is_space(character: str) -> bool:
    # Control characters count as spaces, and with them tabs and line breaks.
    return character == " " or unicodedata.category(character) in ("Cc", "Cf")


def _is_punctuation(character: str) -> bool:
    # In ASCII all that is neither letter nor digit, though Unicode calls $+<=>^`|~ symbols.
    if character.isascii():
        return character.isprintable() and not character.isalnum() and character != " "
    return unicodedata.category(character).startswith("P")


def _is_ideograph(character: str) -> bool:
    return any(first <= ord(character) <= last for first, last in _IDEOGRAPHS)


def _check(texts: Sequence[str]) -> None:
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise UserError("a tokenizer takes a list of texts: write tokenizer([text])")


def _read(path: str | os.PathLike) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(
            f"{os.fspath(path)}: can't be read ({error.strerror}); expected the vocabulary that "
            "is published beside the weights"
        ) from None


def _decode(content: bytes, path: str | os.PathLike) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{os.fspath(path)} is no text ({error.reason} at byte {error.start}): expected a "
            "WordPiece vocabulary, one piece a line"
        ) from None
