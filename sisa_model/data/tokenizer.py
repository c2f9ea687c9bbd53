"""Text to token ids and back, by a file of the `tokenizers` library or byte by byte."""

import codecs
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from sisa_model.data.text import END_OF_TEXT
from sisa_model.utils.files import write_json, write_text

PRINTED = {*range(33, 127), *range(161, 173), *range(174, 256)}  # bytes that stand for themselves


class Encoder:
    """Text to token ids and back: a ``tokenizers`` JSON file, or bytes.

    The end of text is token 256 of bytes. What reads ``<|endoftext|>`` inside a document is
    encoded as the text it is, so that the token stands at the ends of documents alone. Raises
    FileNotFoundError or ValueError for a file that is no tokenizer or has no special token
    ``<|endoftext|>``."""

    def __init__(self, path: Path | None):
        self.tokenizer: Tokenizer | None = None
        self.size = 257
        self.end_of_text = 256
        if path is None:
            return
        if not path.is_file():
            raise FileNotFoundError(f"tokenizer {path} does not exist")
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise ValueError(f"tokenizer {path} is not a tokenizers JSON file: {error}") from error
        end = self.tokenizer.token_to_id(END_OF_TEXT)
        if end is None:
            raise ValueError(f"tokenizer {path} must have a token {END_OF_TEXT}")
        # What a published file sets for inference would cut documents and fill them up.
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = True
        if end in self.tokenizer.encode(END_OF_TEXT, add_special_tokens=False).ids:
            raise ValueError(f"tokenizer {path} must mark its token {END_OF_TEXT} as special")
        self.size = max(self.tokenizer.get_vocab().values()) + 1
        self.end_of_text = end

    def encode(self, texts: list[str]) -> np.ndarray:
        """Token ids of the texts in a row, an end-of-text token after each, as int32."""
        if not texts:
            return np.empty(0, np.int32)
        if self.tokenizer is None:
            encoded = [np.frombuffer(text.encode(), np.uint8) for text in texts]
        else:
            found = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            encoded = [np.asarray(encoding.ids) for encoding in found]
        end = np.array([self.end_of_text])
        return np.concatenate([x.astype(np.int32) for ids in encoded for x in (ids, end)])

    def encode_text(self, text: str) -> list[int]:
        """Token ids of one text, no end of text after them."""
        return self.encode([text])[:-1].tolist()

    def is_same(self, other: "Encoder") -> bool:
        """Whether ``other`` makes the same tokens of any text."""
        mine, theirs = (x.tokenizer or _byte_tokenizer() for x in (self, other))
        return mine.to_str() == theirs.to_str()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write into ``folder`` what transformers' AutoTokenizer and ``generate`` read.

        There what reads ``<|endoftext|>`` is the token, unless ``split_special_tokens=True``."""
        folder = Path(folder)
        tokenizer = self.tokenizer or _byte_tokenizer()
        roles = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **roles}
        write_text(folder / "tokenizer.json", tokenizer.to_str())
        write_json(folder / "tokenizer_config.json", config)
        ids = {f"{role}_id": self.end_of_text for role in roles}
        write_json(folder / "generation_config.json", ids)

    def decode(self, ids: list[int]) -> str:
        """The text of token ids.

        Bytes that are no UTF-8 become the replacement character, ids past the vocabulary
        nothing."""
        if self.tokenizer is not None:
            return self.tokenizer.decode(ids, skip_special_tokens=False)
        parts = (
            END_OF_TEXT.encode() if i == self.end_of_text else bytes([i])
            for i in ids
            if i < self.size
        )
        return b"".join(parts).decode(errors="replace")

    def stream(self) -> "TextStream":
        """A :class:`TextStream` of this encoder's tokens."""
        return TextStream(self)


class TextStream:
    """Token ids in, one at a time, text out in whole characters; together :meth:`Encoder.decode`'s.

    What is no character yet waits for the tokens that complete it."""

    def __init__(self, encoder: Encoder):
        self.encoder = encoder
        self.ids: list[int] = []
        self.given = ""
        self._decoder = decoders.DecodeStream(skip_special_tokens=False)
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        """The text that ``token`` completes, which may be none."""
        self.ids.append(token)
        if self.encoder.tokenizer is not None:
            text = self._decoder.step(self.encoder.tokenizer, token) or ""
        elif token < 256:
            text = self._bytes.decode(bytes([token]))
        else:
            text = self._bytes.decode(b"", final=True) + self.encoder.decode([token])
            self._bytes.reset()
        self.given += text
        return text

    def rest(self) -> str:
        """What waits for more tokens, as :meth:`Encoder.decode` has it."""
        return self.encoder.decode(self.ids)[len(self.given) :]


def _byte_tokenizer() -> Tokenizer:
    """Bytes as a `tokenizers` model: a vocabulary of one letter a byte, and nothing to merge."""
    others = iter(range(256, 512))
    letters = [chr(byte) if byte in PRINTED else chr(next(others)) for byte in range(256)]
    vocab = {letter: byte for byte, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return tokenizer
