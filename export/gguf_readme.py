"""What stands beside a GGUF pair for people and for other programs: the commands, and a Modelfile for Ollama."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from mpa_edge.bundle import Bundle, File, QwenVlImages, describe_file

MODELFILE = "Modelfile"
# Ollama and others reserve memory for the whole context; a picture and its question need a part of it.
CONTEXT = 8192
QUESTION = "What does the sign say?"
SLOT = "\ue000"
QUOTES = '"""'


def write_modelfile(folder: Path, bundle: Bundle) -> File | None:
    """Write the `Modelfile` beside the pair, from `tokenizer.json` there; returns the manifest's entry. None, and no
    file, where the prompt or a stop token holds three quotes in a row: they end a text there, and cannot be escaped."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    # A model may reserve an id that its tokenizer has no text for; nothing stops there but by the id.
    stops = [stop for stop in map(tokenizer.id_to_token, bundle.prompt.stop_token_ids) if stop]
    before, after = _around_question(bundle)
    if any(QUOTES in text for text in (f"{before} {after}", *stops)):
        return None
    model, mmproj = _pair(bundle)
    lines = [
        f"FROM ./{model}",
        f"FROM ./{mmproj}",
        f"TEMPLATE {QUOTES}{_literal(before)}{{{{ .Prompt }}}}{_literal(after)}{QUOTES}",
        "PARAMETER temperature 0",
        f"PARAMETER num_ctx {_context(bundle)}",
        f"PARAMETER num_predict {bundle.prompt.max_new_tokens}",
        *(f"PARAMETER stop {_quoted(stop)}" for stop in stops),
    ]
    (folder / MODELFILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return describe_file(folder, MODELFILE, "config")


def gguf_commands(bundle: Bundle, *, modelfile: bool = True) -> str:
    """The part of a GGUF bundle's README that says how to run it, in Markdown. `modelfile` is whether one is there."""
    model, mmproj = _pair(bundle)
    asked = bundle.prompt.question_template.replace("{question}", QUESTION).replace("\n", "\\n")
    # Sizes of pictures are read from the file or else llama.cpp's own; these are the training's.
    sizes = "".join(f" {flag} {tokens}" for flag, tokens in _picture_flags(bundle).items())
    common = f"-m {model} --mmproj {mmproj} --jinja --temp 0 -n {bundle.prompt.max_new_tokens} -c {_context(bundle)}"
    ollama = f"""\
Ollama takes both files by the Modelfile, which holds the prompt of one picture and one question:

    ollama create {_slug(bundle)} -f {MODELFILE}
    ollama run {_slug(bundle)} "{QUESTION} ./photo.jpg"
"""
    if not modelfile:
        ollama = "There is no Modelfile for Ollama: this prompt holds three quotes in a row, which end a text there.\n"
    wording = "" if asked == QUESTION else " The model was trained with this wording around the question."
    return f"""\
Run these in this folder. Pictures and tokens reach the model exactly as in training here:

    mpa-edge ask . photo.jpg "{QUESTION}"
    mpa-edge serve .

Other programs scale and cut pictures in their own way, so that answers may differ.{wording}

llama.cpp, one question:

    llama-mtmd-cli {common}{sizes} --image photo.jpg -p {shlex.quote(asked)}

llama.cpp, a server with OpenAI's API and a page at http://127.0.0.1:8080:

    llama-server {common}{sizes} --port 8080

LM Studio looks for both files in one folder of its own; choose the model in the app and set the temperature to 0:

    mkdir -p ~/.lmstudio/models/mpa-edge/{_slug(bundle)} && cp *.gguf ~/.lmstudio/models/mpa-edge/{_slug(bundle)}/

{ollama}{_note(bundle)}"""


def tokenizer_warning(bundle: Bundle) -> str | None:
    """What to tell where llama.cpp cuts plain text into other tokens than the model was trained on; None where not."""
    agreement = bundle.checks.get("gguf", {}).get("tokenizer_agreement", 1.0)
    if agreement == 1.0:
        return None
    return (
        f"llama.cpp's own tokenizer agrees with the model's on {agreement:.0%} of the sample texts; its programs and "
        "all that is built on it may answer otherwise, mpa-edge passes token ids and is not affected"
    )


def _literal(text: str) -> str:
    """A text in Ollama's template, which is one of Go's: two braces would begin an action."""
    return re.sub(r"\{\{|\{$", lambda found: f'{{{{ "{found[0]}" }}}}', text)


def _quoted(text: str) -> str:
    """A value in a Modelfile. Nothing is escaped there; between three quotes there may be lines and single quotes."""
    quotes = QUOTES if '"' in text or "\n" in text else '"'
    return f"{quotes}{text}{quotes}"


def _pair(bundle: Bundle) -> tuple[str, str]:
    paths = {file.role: file.path for file in bundle.files}
    return paths["language_model"], paths["mmproj"]


def _context(bundle: Bundle) -> int:
    return min(bundle.prompt.context_length, CONTEXT)


def _around_question(bundle: Bundle) -> tuple[str, str]:
    """The prompt before and after the question, without what stands for the picture: programs put that in themselves,
    with the marks around it, right before the question."""
    text = bundle.prompt.question_template.replace("{question}", SLOT)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
    template = bundle.prompt.chat_template
    rendered: Any = render_jinja_template([messages], chat_template=template, add_generation_prompt=True)[0]
    marks = rf"(<\|vision_start\|>)?{re.escape(bundle.prompt.image_token)}(<\|vision_end\|>)?\s*"
    before, _, after = re.sub(marks, "", rendered[0]).partition(SLOT)
    return before, after


def _picture_flags(bundle: Bundle) -> dict[str, int]:
    """llama.cpp's flags for pictures of dynamic size, in image tokens."""
    images = bundle.image
    if not isinstance(images, QwenVlImages):
        return {}
    token = (images.patch_size * images.merge_size) ** 2
    return {"--image-min-tokens": -(-images.min_pixels // token), "--image-max-tokens": images.max_pixels // token}


def _slug(bundle: Bundle) -> str:
    return re.sub(r"[^a-z0-9._-]+", "-", bundle.name.lower()).strip("-.") or "model"


def _note(bundle: Bundle) -> str:
    warning = tokenizer_warning(bundle)
    text = f"\nMind the tokenizer: {warning}.\n" if warning else ""
    if bundle.family != "llava":
        return text
    return f"""{text}
llama.cpp shifts the patches of CLIP towers by one (ggml-org/llama.cpp#25814), and so does every program that builds on
it; mpa-edge corrects that as it runs. SigLIP towers are not affected.
"""
