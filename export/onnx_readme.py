"""The part of an ONNX bundle's README that says what is in it, and how to run it without mpa-edge."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import onnx

from mpa_edge.bundle import Bundle

QUESTION = "What does the sign say?"
GRAPHS = ("vision_encoder", "embed_tokens", "decoder")
CACHE = ("past_key_values.", "present.")
# transformers.js 4.3 does not know these; the others' processors take the prompt first, LLaVA's the pictures.
UNKNOWN_TO_JS, PICTURES_FIRST = ("internvl",), ("llava",)


def onnx_commands(folder: Path, bundle: Bundle) -> str:
    """The text in Markdown; `folder` holds the graphs."""
    paths: dict[str, str] = {file.role: file.path for file in bundle.files}
    graphs = {role: onnx.load(folder / paths[role], load_external_data=False).graph for role in GRAPHS}
    rows = [f"| `{paths[role]}` | {_values(graph.input)} | {_values(graph.output)} |" for role, graph in graphs.items()]
    return f"""\
Run this in this folder. Pictures and tokens reach the model exactly as in training here:

    mpa-edge ask . photo.jpg "{QUESTION}"

Three graphs, and beside them the processor's files as transformers has them:

| graph | inputs | outputs |
|:--|:--|:--|
{chr(10).join(rows)}

Tokens become embeddings, image features take the places of the image token's, and the decoder goes on from there. Its
cache is empty at first; `present.…` of one call is `past_key_values.…` of the next. Other programs scale and cut
pictures in their own way, so that answers may differ.

{_javascript(bundle)}
{_python(bundle, paths, graphs["decoder"])}"""


def _javascript(bundle: Bundle) -> str:
    if bundle.family in UNKNOWN_TO_JS:
        return "transformers.js does not know this family.\n"
    given = "images, prompt" if bundle.family in PICTURES_FIRST else "prompt, images"
    return f"""\
transformers.js 4 (`npm install @huggingface/transformers`), as `ask.mjs` in this folder:

```js
import {{ AutoModelForImageTextToText, AutoProcessor, env, load_image }} from '@huggingface/transformers';

env.allowRemoteModels = false;
const folder = import.meta.dirname;
const processor = await AutoProcessor.from_pretrained(folder);
const model = await AutoModelForImageTextToText.from_pretrained(folder);
const content = [{{ type: 'image' }}, {{ type: 'text', text: {json.dumps(_asked(bundle))} }}];
const prompt = processor.apply_chat_template([{{ role: 'user', content }}], {{ add_generation_prompt: true }});
const images = [await load_image('photo.jpg')];
const inputs = await processor({given});
const eos_token_id = {list(bundle.prompt.stop_token_ids)};
const settings = {{ do_sample: false, max_new_tokens: {bundle.prompt.max_new_tokens}, eos_token_id }};
const output = await model.generate({{ ...inputs, ...settings }});
const tokens = output.slice(null, [inputs.input_ids.dims.at(-1), null]);
console.log(processor.batch_decode(tokens, {{ skip_special_tokens: true }})[0]);
```
"""


def _python(bundle: Bundle, paths: dict[Any, str], decoder: Any) -> str:
    positions = next(value for value in decoder.input if value.name == "position_ids")
    if len(positions.type.tensor_type.shape.dim) == 3:
        return (
            "Under plain ONNX Runtime `position_ids` are this family's own: time, height and width, as `get_rope_index`"
            " in transformers counts them.\n"
        )
    return f"""\
Plain ONNX Runtime (`pip install onnxruntime transformers torch torchvision`):

```python
import numpy as np
import onnxruntime as ort
from PIL import Image
from transformers import AutoProcessor

vision, embed, decoder = (
    ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    for path in (
        "{paths["vision_encoder"]}",
        "{paths["embed_tokens"]}",
        "{paths["decoder"]}",
    )
)
processor = AutoProcessor.from_pretrained(".")
content = [{{"type": "image"}}, {{"type": "text", "text": {json.dumps(_asked(bundle))}}}]
prompt = processor.apply_chat_template([{{"role": "user", "content": content}}], add_generation_prompt=True)
inputs = dict(processor(text=[prompt], images=[Image.open("photo.jpg").convert("RGB")], return_tensors="np"))
kinds = {{"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(bool)": bool, "tensor(int64)": np.int64}}
pixels = {{value.name: inputs[value.name].astype(kinds[value.type]) for value in vision.get_inputs()}}
features = vision.run(None, pixels)[0]
ids = inputs["input_ids"].astype(np.int64)
embeds = embed.run(None, {{"input_ids": ids}})[0]
embeds[ids == {_image_token(bundle)}] = features.reshape(-1, features.shape[-1])
past = {{
    value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), kinds[value.type])
    for value in decoder.get_inputs()
    if value.name.startswith("past_key_values.")
}}
names = [value.name for value in decoder.get_outputs()]
seen, tokens = 0, []
while len(tokens) < {bundle.prompt.max_new_tokens}:
    total = seen + embeds.shape[1]
    feed = {{"inputs_embeds": embeds, "attention_mask": np.ones((1, total), np.int64)}}
    feed["position_ids"] = np.arange(seen, total)[None]
    outputs = dict(zip(names, decoder.run(None, feed | past)))
    token = int(outputs.pop("logits")[0, -1].argmax())
    if token in {list(bundle.prompt.stop_token_ids)}:
        break
    tokens.append(token)
    past = {{name.replace("present", "past_key_values"): value for name, value in outputs.items()}}
    seen, embeds = total, embed.run(None, {{"input_ids": np.array([[token]])}})[0]
print(processor.decode(tokens, skip_special_tokens=True))
```
"""


def _image_token(bundle: Bundle) -> str:
    return f"processor.tokenizer.convert_tokens_to_ids({json.dumps(bundle.prompt.image_token)})"


def _asked(bundle: Bundle) -> str:
    return bundle.prompt.question_template.replace("{question}", QUESTION)


def _values(values: Iterable[Any]) -> str:
    """Names, types and shapes; the cache's, of which there are two per layer, once."""
    told: dict[str, None] = {}
    for value in values:
        name = value.name
        if name.startswith(CACHE):
            name = f"{name.partition('.')[0]}.*"
        tensor = value.type.tensor_type
        kind = onnx.TensorProto.DataType.Name(tensor.elem_type).lower()
        shape = ", ".join(axis.dim_param or str(axis.dim_value) for axis in tensor.shape.dim)
        told[f"`{name}` {kind} ({shape})"] = None
    return "<br>".join(told)
