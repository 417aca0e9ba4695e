"""What a page does, apart from its widgets: find the hint, make the images."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cldm.pictures import write_png
from webui.condition import Condition, Example, Hint
from webui.folder import KEPT, tidy
from webui.session import Order, Session, StepReport

Picture = tuple[str, str]  # path and caption


@dataclass
class Painter:
    """A condition with a model and the hints to pick from."""

    condition: Condition
    session: Session
    examples: Sequence[Example] = field(default_factory=list)

    def find_hint(self, file: str | None, kind: str, example: str) -> Hint:
        """The hint of a file that was loaded, else of a picked example; ValueError says what is wrong."""
        if file:
            return self.condition.read(Path(file), self.condition.kinds[kind], self.session.size)
        hints = {found.hint.name: found.hint for found in self.examples}
        if example not in hints:
            raise ValueError(f"expected a file or the name of an example ({', '.join(hints)}), found neither")
        return hints[example]

    def prompt_for(self, example: str, prompt: str) -> str:
        """The caption of an example, unless the visitor wrote a prompt."""
        captions = {found.hint.name: found.prompt for found in self.examples}
        return captions[example] if not prompt.strip() or prompt in captions.values() else prompt

    def thumbnails(self) -> list[str]:
        """A picture of each example, written on the first call."""
        folder = self.session.folder / KEPT / "thumbnails"
        paths = [folder / f"{i}.png" for i in range(len(self.examples))]
        for path, example in zip(paths, self.examples, strict=True):
            if not path.exists():
                folder.mkdir(parents=True, exist_ok=True)
                write_png(path, example.hint.colours)
        return [str(path) for path in paths]

    def paint(self, hint: Hint, order: Order, report: StepReport | None = None) -> tuple[list[Picture], str]:
        """Each image and the same under its hint, and a sentence about them all."""
        start = time.perf_counter()
        results = self.session.run(hint, order, report)
        tidy(self.session.folder)
        seconds = time.perf_counter() - start
        pictures = [(str(r.image), f"seed {r.seed}") for r in results]
        mixed = [(str(r.mixed), f"seed {r.seed}, under the {self.condition.noun}") for r in results]
        height, width = hint.colours.shape[:2]
        many = f"{len(results)} images" if len(results) > 1 else "1 image"
        note = f"{many} of {height}x{width} in {seconds:.1f} s. Each PNG holds its settings."
        return [part for pair in zip(pictures, mixed, strict=True) for part in pair], note
