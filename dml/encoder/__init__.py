"""Pictures to vectors, with or without torch: the hand-over between training and everything after it."""

from dml.encoder.artifact import (
    EncoderReport,
    check_encoder,
    create_encoder,
    export_encoder,
    save_encoder,
)
from dml.encoder.embeddings import Embeddings, embed_table, is_embeddings, open_embeddings
from dml.encoder.encoder import EmbeddedBatch, EmbeddedFiles, Encoder
from dml.encoder.manifest import find_encoder, is_encoder
from dml.encoder.preprocess import Preprocess
from dml.encoder.profiles import Profile, ProfileAgreement

__all__ = [
    "EmbeddedBatch",
    "EmbeddedFiles",
    "Embeddings",
    "Encoder",
    "EncoderReport",
    "Preprocess",
    "Profile",
    "ProfileAgreement",
    "check_encoder",
    "create_encoder",
    "embed_table",
    "export_encoder",
    "find_encoder",
    "is_embeddings",
    "is_encoder",
    "open_embeddings",
    "save_encoder",
]
