"""What tells files apart: the hash of the whole, and a fingerprint that is read at once."""

from __future__ import annotations

import hashlib
from pathlib import Path

PIECES, PIECE_BYTES = 64, 1 << 16  # of a fingerprint


def sha256_of(path: str | Path) -> str:
    """Return the SHA-256 of a file in hexadecimal, reading it in pieces."""
    digest, piece = hashlib.sha256(), memoryview(bytearray(1 << 20))
    with Path(path).open("rb", buffering=0) as file:
        while count := file.readinto(piece):
            digest.update(piece[:count])
    return digest.hexdigest()


def fingerprint(path: str | Path) -> str:
    """Tell files apart at once, whatever their size: SHA-256 of the length and of 64 pieces of 64 KiB.

    The pieces are spread evenly from the first to the last byte, so every part of a model is in some of them.
    That of a folder is made of the names and fingerprints of its files.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        lines = [f"{file.relative_to(path).as_posix()} {fingerprint(file)}" for file in files]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
    size = Path(path).stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with Path(path).open("rb") as file:
        for i in range(PIECES):
            file.seek(max(0, size - PIECE_BYTES) * i // (PIECES - 1))
            digest.update(file.read(PIECE_BYTES))
    return digest.hexdigest()[:16]
