"""Checkpoints: load, save and convert models in the formats that people already have."""

from statespan.checkpoints.checkpoint import convert, detect, load, save
from statespan.checkpoints.tokenizer import ByteTokenizer, FileTokenizer

__all__ = ["ByteTokenizer", "FileTokenizer", "convert", "detect", "load", "save"]
