"""Flax networks. They depend on the policies' output types and on no other policy mathematics."""

from piflow_jax.models.dit import DiT
from piflow_jax.models.heads import ArcHead, DXHead, GMHead, VelocityHead
from piflow_jax.models.initial import initialize_student, student_from_teacher

__all__ = [
    "ArcHead",
    "DXHead",
    "DiT",
    "GMHead",
    "VelocityHead",
    "initialize_student",
    "student_from_teacher",
]
