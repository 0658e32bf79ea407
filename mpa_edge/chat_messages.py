"""What goes over the wire to a chat server: a picture and a prompt as a request, and its reply as an answer."""

from __future__ import annotations

import base64
import io
import re
from typing import Any

from PIL import Image

from mpa_edge.chat_address import is_openai
from mpa_edge.runtime.vlm import Answer, Decoding

# Small pictures travel without loss: in 200 pixels of a chart, JPEG's artefacts are as large as its digits. A photo of
# 12 megapixels would take 20 MB that way; at this quality and without chroma subsampling it takes 5.
PNG_PIXELS = 512 * 512
JPEG_QUALITY = 95
ENCODING = {"png_up_to_pixels": PNG_PIXELS, "jpeg_quality": JPEG_QUALITY, "jpeg_subsampling": "4:4:4"}
# How a failure is told that is the server's, whichever the picture.
NO_ANSWER = "the server's reply holds no answer"

# What some model's tokenizer takes for a token of its own: <image>, </s>, <|im_end|>, <｜User｜>, <row_1_col_1>, [INST]
_CONTROL = re.compile(r"<(?=[/|｜]{0,2}[\w▁][^<>\s]{0,60}>)|\[(?=/?[A-Z_]{2,40}\])")
# Has no width, and keeps what it stands in from being one token.
_APART = "\u200b"


def without_control_tokens(text: str) -> str:
    """The text with a zero width space inside of whatever a chat server's tokenizer may take for a control token: it
    reads markers in a message as it reads its template's own, so that a question could end the turn."""
    return _CONTROL.sub(lambda found: found[0] + _APART, text)


def request_of(
    model: str, host: str, image: Image.Image, prompt: str, decoding: Decoding, longest_edge: int | None
) -> dict[str, Any]:
    """The arguments of `chat.completions.create` for one question about one picture, as one user turn."""
    picture = {"type": "image_url", "image_url": {"url": data_url(image, longest_edge)}}
    text = {"type": "text", "text": without_control_tokens(prompt)}
    # Some hosts refuse what they do not know, so nothing is sent that does not matter.
    chance = {"top_p": decoding.top_p, "seed": decoding.seed} if decoding.temperature > 0 else {}
    # OpenAI's newer models refuse the old name, which everybody else has.
    limit = "max_completion_tokens" if is_openai(host) else "max_tokens"
    return {
        "model": model,
        "messages": [{"role": "user", "content": [picture, text]}],
        "temperature": decoding.temperature,
        limit: decoding.max_new_tokens,
        **chance,
    }


def data_url(image: Image.Image, longest_edge: int | None) -> str:
    """An RGB picture as it is sent: scaled down if it must be, PNG up to `PNG_PIXELS`, JPEG above."""
    if longest_edge is not None and max(image.size) > longest_edge:
        scale = longest_edge / max(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.LANCZOS)
    file = io.BytesIO()
    if image.width * image.height <= PNG_PIXELS:
        kind = "png"
        image.save(file, "PNG")
    else:
        kind = "jpeg"
        image.save(file, "JPEG", quality=JPEG_QUALITY, subsampling="4:4:4")
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def answer_of(completion: Any) -> Answer:
    """What a reply says. Servers differ in what they leave out, and the client checks nothing."""
    choices = getattr(completion, "choices", None)
    if not isinstance(choices, list) or not choices:
        told = getattr(completion, "error", None)
        return failed(f"{NO_ANSWER}{f': {told}' if told else ''}")
    message = getattr(choices[0], "message", None)
    finish = getattr(choices[0], "finish_reason", None)
    refusal = getattr(message, "refusal", None)
    text = text_of(getattr(message, "content", None))
    if finish == "content_filter":
        return failed("stopped by the server's content filter")
    if refusal and not text:
        return failed(f"refused: {refusal}")
    if finish == "error" or (text is None and finish != "length"):
        return failed("the server's reply holds no text")
    usage = getattr(completion, "usage", None)
    prompt_tokens = getattr(usage, "prompt_tokens", None)
    return Answer(
        text=(text or "").strip(),
        prompt_tokens=prompt_tokens if isinstance(prompt_tokens, int) else None,
        finish_reason="length" if finish == "length" else "stop",
    )


def text_of(content: Any) -> str | None:
    """The text of a message: a string, or the text parts of a list."""
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict)]
        return _sound("".join(text for text in texts if isinstance(text, str))) if any(texts) else None
    return _sound(content) if isinstance(content, str) else None


def failed(reason: str) -> Answer:
    """The answer to what could not be answered."""
    return Answer("", finish_reason="error", error=_sound(reason))


def _sound(text: str) -> str:
    """The text without halves of surrogate pairs, which JSON may hold and no file can."""
    return text.encode("utf-8", "replace").decode()
