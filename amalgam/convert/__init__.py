"""Converting the students that the authors of the paper released."""

from amalgam.convert.students import convert, read_checkpoint, read_npz, student_from_keras

__all__ = ["convert", "read_checkpoint", "read_npz", "student_from_keras"]
