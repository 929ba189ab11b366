"""Flax networks. They know the policies' output type and no other policy mathematics."""

from piflow_jax.models.dit import DiT, initialize_student, student_from_teacher
from piflow_jax.models.heads import ArcHead, DXHead, GMHead, VelocityHead

__all__ = [
    "ArcHead",
    "DXHead",
    "DiT",
    "GMHead",
    "VelocityHead",
    "initialize_student",
    "student_from_teacher",
]
