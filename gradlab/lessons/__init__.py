"""The lessons: scripts under `analyses/lessons/`, each with exercises whose answers are measured when they are checked.

>>> gl.lesson(1).title
'Value or gradient?'
"""

from gradlab.lessons.lesson import Exercise, Lesson, Reply, lesson, lessons

__all__ = ["Exercise", "Lesson", "Reply", "lesson", "lessons"]
