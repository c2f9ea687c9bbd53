"""Text to token ids and back, by a file of the `tokenizers` library or byte by byte."""

from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from sisa_model.data.text import END_OF_TEXT


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
