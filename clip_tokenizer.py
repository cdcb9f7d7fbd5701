"""CLIP's tokenizer: byte-level byte-pair encoding of lower-cased text into 49408 ids.

    >>> tokenize(["archery", "juggling balls"]).shape
    torch.Size([2, 77])
    >>> decode(encode("Juggling balls!"))
    'juggling balls ! '

The ids are those of OpenAI's CLIP for any string. Text becomes ids in four steps:

  1. clean: mend broken Unicode (ftfy), resolve HTML entities twice, fold white space, lower-case;
  2. split into words: 's, 't, 'll and the like, else letters together, every digit alone, and
     other characters together;
  3. write each word as UTF-8 bytes, each byte as one printable character, "</w>" on the last;
  4. merge neighbours, the pair that comes first in the vocabulary file before all others.

The vocabulary, bpe_simple_vocab_16e6.txt.gz, lies beside this file (OpenAI, MIT licence). Ids: 256
bytes, 256 bytes that end a word, 48894 merges, start of text (49406), end of text (49407).
"""

import gzip
import html
from functools import lru_cache
from pathlib import Path

import ftfy
import regex
import torch

VOCABULARY = Path(__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
NUM_MERGES = 48894
SPECIAL = ("<|startoftext|>", "<|endoftext|>")
WORD = regex.compile(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
                     r"|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE)


@lru_cache(1)
def _byte_characters():
    """A printable character for each byte: itself where it is one, else the next from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable}
    return characters | {byte: chr(0x100 + i) for i, byte in enumerate(others)}


@lru_cache(1)
def _vocabulary():
    """-> {token: id} and {pair of tokens: its rank}, read from the file at first use."""
    lines = gzip.decompress(VOCABULARY.read_bytes()).decode("utf-8").split("\n")
    merges = [tuple(line.split()) for line in lines[1 : NUM_MERGES + 1]]  # line 0 is a header
    characters = list(_byte_characters().values())
    tokens = characters + [c + "</w>" for c in characters] + ["".join(pair) for pair in merges]
    return ({token: i for i, token in enumerate([*tokens, *SPECIAL])},
            {pair: rank for rank, pair in enumerate(merges)})


@lru_cache(1 << 16)
def _encode_word(word):
    ids, ranks = _vocabulary()
    if word in SPECIAL:
        return [ids[word]]
    parts = [_byte_characters()[byte] for byte in word.encode("utf-8")]
    parts[-1] += "</w>"
    while len(parts) > 1:
        best = min(zip(parts, parts[1:]), key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        merged, i = [], 0
        while i < len(parts):
            if tuple(parts[i : i + 2]) == best:
                merged.append(parts[i] + parts[i + 1])
                i += 2
            else:
                merged.append(parts[i])
                i += 1
        parts = merged
    return [ids[part] for part in parts]


def encode(text):
    """The ids of a text of any length, without start and end of text."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    text = regex.sub(r"\s+", " ", text).strip().lower()
    return [i for word in WORD.findall(text) for i in _encode_word(word)]


def decode(ids):
    """The text of ids (a list or a 1-D tensor): lower-cased, with a blank after every word.

    Padding reads as "!", whose id is 0 too; an id of 49408 or more is an IndexError.
    """
    tokens = list(_vocabulary()[0])
    byte_of = {character: byte for byte, character in _byte_characters().items()}
    text = "".join(tokens[int(i)] for i in ids)
    return bytes(byte_of[c] for c in text).decode("utf-8", errors="replace").replace("</w>", " ")


def tokenize(texts, context_length=77, truncate=False):
    """Ids of one text or a list of texts between start and end of text, padded with 0.

    Returns a LongTensor (N, context_length). A text of more tokens than fit is a ValueError that
    says how many it has; with `truncate` it is cut and keeps its end-of-text token.
    """
    start, end = (_vocabulary()[0][token] for token in SPECIAL)
    texts = [texts] if isinstance(texts, str) else list(texts)
    result = torch.zeros(len(texts), context_length, dtype=torch.long)
    for row, text in zip(result, texts):
        ids = [start, *encode(text), end]
        if len(ids) > context_length:
            if not truncate:
                raise ValueError(f"a text has {len(ids)} tokens with start and end, "
                                 f"{context_length} fit: {text[:60]!r}")
            ids[context_length - 1 :] = [end]
        row[: len(ids)] = torch.tensor(ids)
    return result
