"""From texts to the numbers that a text tower reads: the two tokenizers of LiT.

Both give int32 arrays (n, max_len); the vocabulary is a file that is published beside the weights.
"""

import importlib
import os
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vit_jax.errors import UserError
from vit_jax.files import open_file

MAX_LEN = 16  # Tokens in a text of the published LiT models.

_MAX_BYTES = 100  # A longer word is unknown.

# Control characters count as spaces, and with them tabs and line breaks.
_SPACES = r"[ \p{Cc}\p{Cf}]+"
# What is a word of its own: in ASCII all that is neither letter nor digit, though Unicode calls
# $+<=>^`|~ symbols; Unicode's punctuation; and CJK ideographs, as in arXiv:1810.04805's code.
_ALONE = (
    r"[!-/:-@\[-`{-~\p{P}"
    "\u4e00-\u9fff\u3400-\u4dbf\U00020000-\U0002a6df\U0002a700-\U0002b73f\U0002b740-\U0002b81f"
    "\U0002b820-\U0002ceaf\uf900-\ufaff\U0002f800-\U0002fa1f]"
)
# Unicode's Default_Ignorable_Code_Point: soft hyphens, joiners, variation selectors and the like.
_IGNORABLE = re.compile(
    "[\u00ad\u034f\u061c\u115f-\u1160\u17b4-\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e"
    "\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3"
    "\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)


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

    Raises UserError if the package `tokenizers` is missing, or if the file can't be read or is no
    such vocabulary.
    """

    def __init__(self, vocab_path: str | os.PathLike, max_len: int = MAX_LEN) -> None:
        library = _import("tokenizers")
        try:
            pieces = _read(vocab_path).decode("utf-8").split("\n")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{os.fspath(vocab_path)} is no text ({error.reason} at byte {error.start}): "
                "expected a WordPiece vocabulary, one piece a line"
            ) from None
        ids = {piece.rstrip("\r"): i for i, piece in enumerate(pieces) if piece}
        for needed in ("[CLS]", "[UNK]"):
            if needed not in ids:
                raise UserError(
                    f"{vocab_path} is no WordPiece vocabulary: expected a line {needed} "
                    "among one piece a line; give the .txt published beside the weights"
                )
        split, regex = library.pre_tokenizers.Split, library.Regex
        self._splitter = library.pre_tokenizers.Sequence(
            [split(regex(_SPACES), "removed"), split(regex(_ALONE), "isolated")]
        )
        self._model = library.models.WordPiece(
            ids, unk_token="[UNK]", max_input_chars_per_word=_MAX_BYTES
        )
        self._start, self._unknown = ids["[CLS]"], ids["[UNK]"]
        self.max_len = max_len

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Token ids of texts, int32 (n, max_len); longer texts are cut."""
        _check(texts)
        tokens = np.zeros((len(texts), self.max_len), np.int32)
        for row, text in zip(tokens, texts, strict=True):
            ids = [self._start]
            for word, _ in self._splitter.pre_tokenize_str(_fold(text)):
                if len(ids) >= self.max_len:
                    break
                if len(word.encode()) > _MAX_BYTES:
                    ids.append(self._unknown)
                else:
                    ids += [token.id for token in self._model.tokenize(word)]
            row[: len(ids)] = ids[: self.max_len]
        return tokens


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
        self._processor = _import("sentencepiece").SentencePieceProcessor()
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
            ids = self._processor.encode(_whole(text))[: self.max_len - 1]
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


def _import(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(
            f"the package {package} is not installed, and this text tower's words need it: "
            f"pip install {package}"
        ) from error


def _whole(text: str) -> str:
    """Without halves of surrogate pairs, which file names may hold and the packages refuse."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _fold(text: str) -> str:
    """Without case, accents and differences that are only of looks; decomposed (NFD)."""
    # Folding may give characters that can be decomposed and the other way round, but not twice.
    text = unicodedata.normalize("NFKD", _IGNORABLE.sub("", _whole(text))).casefold()
    text = _IGNORABLE.sub("", unicodedata.normalize("NFKD", text).casefold())
    text = unicodedata.normalize("NFD", text)
    return "".join(c for c in text if unicodedata.category(c) != "Mn")


def _check(texts: Sequence[str]) -> None:
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise UserError("a tokenizer takes a list of texts: write tokenizer([text])")


def _read(path: str | os.PathLike) -> bytes:
    try:
        with open_file(path) as file:
            return file.read()
    except OSError as error:
        raise UserError(
            f"{os.fspath(path)}: can't be read ({error.strerror}); expected the vocabulary that "
            "is published beside the weights"
        ) from None
