"""Files written with fsync, each with a SHA-256 file beside it until rank 0 collects the checksums."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterable
from pathlib import Path

import torch

__all__ = ["SUM", "checksum", "hashed", "replace_file", "write_file", "write_sum"]

SUM = ".sha256"
"""Suffix of a checksum file."""
_BLOCK_BYTES = 1 << 20


def write_file(path: Path, blocks: Iterable[torch.Tensor]) -> str:
    """Write bytes to a file and its checksum beside it, with fsync; returns the checksum."""
    with path.open("wb", buffering=0) as file:
        checksum, nbytes = hashed(blocks, file)
        os.fsync(file.fileno())
    write_sum(path, checksum, nbytes)
    return checksum


def hashed(blocks: Iterable[torch.Tensor], file: io.RawIOBase | None = None) -> tuple[str, int]:
    """The SHA-256 and the number of bytes, which are also written to `file` if given.

    Neither hashing nor writing holds the GIL, so training continues meanwhile.
    """
    digest, nbytes = hashlib.sha256(), 0
    for block in blocks:
        for piece in block.split(_BLOCK_BYTES):
            content = memoryview(piece.numpy())
            digest.update(content)
            nbytes += len(content)
            while file is not None and content:
                content = content[file.write(content) :]
    return digest.hexdigest(), nbytes


def write_sum(path: Path, checksum: str, nbytes: int) -> None:
    """Write the checksum of a file beside it, for rank 0."""
    sum_path = path.with_name(path.name + SUM)
    with sum_path.open("w") as text:
        text.write(f"{checksum} {nbytes}")
        text.flush()
        os.fsync(text.fileno())


def replace_file(path: Path, content: str) -> None:
    """Replace a file atomically by a text, which is on disk when this returns."""
    temporary = path.with_name(f".{path.name}")
    with temporary.open("w") as text:
        text.write(content)
        text.flush()
        os.fsync(text.fileno())
    os.replace(temporary, path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def checksum(path: Path) -> str:
    """The SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
