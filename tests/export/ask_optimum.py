"""Ask a bundle through optimum-intel, without our code: FOLDER QUESTION PICTURE…; prints the new tokens as JSON.

For an environment of its own: pip install "optimum-intel[openvino]==2.2.0"
"""

from __future__ import annotations

import json
import sys

from optimum.intel.openvino import OVModelForVisualCausalLM
from PIL import Image
from transformers import AutoProcessor


def main(folder: str, question: str, *pictures: str) -> None:
    exact = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    model = OVModelForVisualCausalLM.from_pretrained(folder, ov_config=exact, device="CPU")
    processor = AutoProcessor.from_pretrained(folder)
    content = [{"type": "image"}, {"type": "text", "text": question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    answers = []
    for picture in pictures:
        inputs = processor(text=[prompt], images=[Image.open(picture)], return_tensors="pt")
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=10)
        answers.append(tokens[0, inputs["input_ids"].shape[1] :].tolist())
    print(json.dumps(answers))  # noqa: T201


main(*sys.argv[1:])
