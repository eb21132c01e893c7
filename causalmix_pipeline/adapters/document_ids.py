"""Names of documents: a hash of what they say, so that equal content has one name everywhere."""

from __future__ import annotations

import hashlib


def document_id(text: str, prompt_chars: int = 0) -> str:
    """Content hash of a document: BLAKE2b, 128 bits, 32 hex digits.

    Args:
        text: the document's text.
        prompt_chars: characters of `text` before the response; the same text divided otherwise is
            another document to a scorer that masks the prompt.
    """
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=16)
    if prompt_chars:
        digest.update(b"\0prompt %d" % prompt_chars)  # no text that passes the door holds a NUL
    return digest.hexdigest()


def fold_of(identity: str) -> int:
    """Half of the experiment pool that a document belongs to, by its content hash: 0 or 1."""
    return int(identity[0], 16) & 1
