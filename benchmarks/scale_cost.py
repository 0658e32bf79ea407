"""What a run of many pictures costs: GPU-hours, requests and disk, from a few numbers that are written beside them."""

from __future__ import annotations

from dataclasses import dataclass

IMAGES = (20_000, 100_000, 1_000_000)
GPUS = (1, 8, 64)


@dataclass(frozen=True)
class CostModel:
    """Seconds are of one GPU, for one answer, while it is kept busy with batches. The defaults were measured on an H100
    with 16 CPU cores (`benchmarks.gpu_cost`): random weights of Qwen2-VL-7B's dimensions write 60 tokens of question
    and answer, or 8 of a short answer, and SmolVLM-500M's answer in 8, about photos of 1,000 image tokens and 13 tiles,
    by transformers in batches of 32. A server such as vLLM is faster; `mpa-edge align --plan` measures yours.
    `us_per_row` and `bytes_per_row` are measured too: what this tool takes itself, on one CPU core, and what it writes,
    for one question. How many questions are usable is assumed. GPUs share the asking evenly (`--engine ray`, or servers
    behind one address); training is left out: `--plan` tells it.
    """

    us_per_row: float
    bytes_per_row: float
    questions: int = 3
    usable: float = 0.8
    votes: int = 1
    write_s: float = 0.14
    check_s: float = 0.053
    student_s: float = 0.063

    def requests(self, images: int) -> int:
        """Answers of the teacher: each question written, and each usable one answered `votes` times."""
        return round(images * self.questions * (1 + self.usable * self.votes))

    def gpu_hours(self, images: int) -> float:
        """Teacher and student together."""
        each = self.write_s + self.usable * (self.votes * self.check_s + self.student_s)
        return images * self.questions * each / 3600

    def own_hours(self, images: int) -> float:
        """What this tool takes besides, in one process."""
        return images * self.questions * self.us_per_row / 1e6 / 3600

    def gigabytes(self, images: int) -> float:
        """Of the run folder; the pictures stay where they are."""
        return images * self.questions * self.bytes_per_row / 1e9

    def lines(self) -> list[str]:
        """The table with its assumptions, for people."""
        hours = [f"{count} GPU{'s' if count > 1 else ''}" for count in GPUS]
        head = f"{'images':>10} {'requests':>10} {'disk GB':>8} {'GPU-hours':>10} " + " ".join(f"{h:>9}" for h in hours)
        return [
            "Model of cost (asking; hours on so many GPUs, or of this tool's own process where that is the longer):",
            head,
            *(self._line(images) for images in IMAGES),
            f"Assumed: {self.questions} questions per picture, {self.usable:.0%} of them usable, {self.votes} vote; GPU"
            f" seconds per answer: {self.write_s} to write, {self.check_s} to check, {self.student_s} of the student "
            "(7B and 0.5B by transformers on an H100: `benchmarks.gpu_cost`; `mpa-edge align --plan` measures yours).",
            f"Measured: {self.us_per_row} us of one CPU core and {self.bytes_per_row} bytes per question.",
        ]

    def _line(self, images: int) -> str:
        total, own = self.gpu_hours(images), self.own_hours(images)
        walls = " ".join(f"{max(total / count, own):>8.1f}h" for count in GPUS)
        return f"{images:>10,} {self.requests(images):>10,} {self.gigabytes(images):>8.1f} {total:>10.1f} {walls}"
