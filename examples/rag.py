"""Answers questions from a folder of texts, and says which files they are from.

python examples/rag.py FOLDER "When is the library open?"
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from forebay import LiteLLMGateway

NEAREST = 3
PROMPT = "Answer from these notes only, in one sentence.\n\n{notes}\n\nQuestion: {question}"


@dataclass
class Index:
    """Paragraphs of a folder's texts, and their vectors: float32, one row each, of length 1."""

    sources: list[str]
    paragraphs: list[str]
    vectors: NDArray[np.float32]

    @classmethod
    def of(cls, folder: Path, gateway: LiteLLMGateway) -> Index:
        found = [
            (file.name, paragraph.strip())
            for file in sorted(folder.rglob("*"))
            if file.suffix in (".txt", ".md")
            for paragraph in file.read_text(encoding="utf-8").split("\n\n")
            if paragraph.strip()
        ]
        if not found:
            sys.exit(f"{folder} holds no .txt or .md files with text")
        sources, paragraphs = (list(column) for column in zip(*found, strict=True))
        return cls(sources, paragraphs, gateway.embed(paragraphs).array)

    def nearest(self, question: str, gateway: LiteLLMGateway) -> list[int]:
        scores = self.vectors @ gateway.embed(question).array[0]
        return [int(row) for row in np.argsort(-scores)[:NEAREST]]


def main(folder: str, question: str) -> None:
    with LiteLLMGateway() as gateway:
        index = Index.of(Path(folder), gateway)
        rows = index.nearest(question, gateway)
        notes = "\n".join(index.paragraphs[row] for row in rows)
        prompt = PROMPT.format(notes=notes, question=question)
        print(gateway.generate(prompt, max_tokens=80, temperature=0).text)
        print("Sources:", ", ".join(dict.fromkeys(index.sources[row] for row in rows)))


if __name__ == "__main__":
    main(*sys.argv[1:])
