"""Run the lessons and write what they show into docs/lessons: `python scripts/render_lessons.py [NUMBER …]`.

Each becomes a page in Markdown, with its outputs, and a picture for each figure. Needs the extra `teach`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jupytext
from nbclient import NotebookClient
from nbconvert import MarkdownExporter

from gradlab.lessons import Lesson, lessons

ROOT = Path(__file__).parents[1]


def page(lesson: Lesson, folder: Path) -> Path:
    """Run a lesson in a kernel of its own, from the root of the repository, and write its page and pictures to a folder."""
    notebook = jupytext.read(lesson.path)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(ROOT)}}).execute()
    exporter = MarkdownExporter()
    named = {"unique_key": lesson.name, "output_files_dir": "."}
    text, found = exporter.from_notebook_node(notebook, resources=named)
    folder.mkdir(parents=True, exist_ok=True)
    names = {}
    for k, (name, content) in enumerate(found["outputs"].items(), start=1):
        names[name] = f"{lesson.name}-{k}.png"
        (folder / names[name]).write_bytes(content)
    for name, short in names.items():
        text = text.replace(f"![png]({name})", f"![The figure of lesson {lesson.number}]({short})")
    path = folder / f"{lesson.name}.md"
    opened = f"*Lesson {lesson.number}. As a notebook: `gradlab lesson {lesson.number}`.*\n\n"
    first, rest = text.strip().split("\n", 1)
    path.write_text(f"{first}\n\n{opened}{rest.lstrip()}\n", encoding="utf-8")
    return path


if __name__ == "__main__":
    asked = [int(number) for number in sys.argv[1:]]
    for number, lesson in lessons().items():
        if not asked or number in asked:
            print(page(lesson, ROOT / "docs" / "lessons"))
