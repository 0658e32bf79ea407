// Ask questions about pictures with transformers.js, from an ONNX bundle on disk.
//
//   npm install --prefix tests/node
//   node tests/node/answer.mjs BUNDLE PICTURE "question" [PICTURE "question" …]
//
//   --json              a line of JSON per question: text, token ids, prompt token ids
//   --max-new-tokens N  instead of the bundle's own
//   --library-pictures  let transformers.js resize: not the pixels that the model was trained on
//   --dump FOLDER       write the pixel values of question i to FOLDER/i.f32
//
// Differences to `mpa-edge ask` that remain: a special token that somebody types into a question is taken for one, and
// grey PNGs with transparency are refused by transformers.js.

import { readFileSync, writeFileSync } from 'node:fs';
import { join, resolve } from 'node:path';
import { parseArgs } from 'node:util';
import { AutoModelForImageTextToText, AutoProcessor, LlavaProcessor, env } from '@huggingface/transformers';
import { exactPictures, readPicture } from './pictures.mjs';

env.allowRemoteModels = false;

/** Processor, model and manifest of a bundle. config.json says which precision of each graph to load. */
async function open(folder, { exact }) {
  const bundle = JSON.parse(readFileSync(join(folder, 'bundle.json')));
  if (bundle.engine !== 'onnxruntime') refuse(`${folder} is a bundle for ${bundle.engine}; export one with --format onnx`);
  const { model_type } = JSON.parse(readFileSync(join(folder, 'config.json')));
  if (!AutoModelForImageTextToText.supports(model_type)) {
    refuse(`transformers.js ${env.version} does not know models of type ${model_type}`);
  }
  const processor = await AutoProcessor.from_pretrained(folder);
  const model = await AutoModelForImageTextToText.from_pretrained(folder);
  if (exact) exactPictures(processor, model.config);
  return { processor, model, prompt: bundle.prompt };
}

/** The model's inputs: the question in the bundle's question template, in the chat template of tokenizer_config.json. */
async function inputsOf({ processor, prompt }, picture, question) {
  const text = prompt.question_template.replaceAll('{question}', () => question);
  const turn = { role: 'user', content: [{ type: 'image' }, { type: 'text', text }] };
  const chat = processor.apply_chat_template([turn], { add_generation_prompt: true });
  const images = [await readPicture(picture)];
  return processor instanceof LlavaProcessor ? processor(images, chat) : processor(chat, images);
}

async function answer({ processor, model, prompt }, inputs, maxNewTokens) {
  const read = inputs.input_ids.tolist()[0].map(Number);
  const room = prompt.context_length - read.length;
  if (room <= 0) refuse(`the prompt takes ${read.length} of ${prompt.context_length} tokens; ask a shorter question`);
  const output = await model.generate({
    ...inputs,
    do_sample: false,
    repetition_penalty: 1,
    eos_token_id: prompt.stop_token_ids,
    max_new_tokens: Math.min(maxNewTokens ?? prompt.max_new_tokens, room),
  });
  const tokens = output.tolist()[0].slice(read.length).map(Number);
  if (prompt.stop_token_ids.includes(tokens.at(-1))) tokens.pop();
  // An empty list is an error for `decode`, and by default it takes away spaces before punctuation.
  const told = { skip_special_tokens: true, clean_up_tokenization_spaces: false };
  const text = tokens.length ? processor.tokenizer.decode(tokens, told).trim() : '';
  return { text, tokens, prompt: read };
}

function refuse(why) {
  console.error(why);
  process.exit(1);
}

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    json: { type: 'boolean' },
    'max-new-tokens': { type: 'string' },
    'library-pictures': { type: 'boolean' },
    dump: { type: 'string' },
  },
});
const [folder, ...pairs] = positionals;
if (!pairs.length || pairs.length % 2) {
  refuse('usage: node answer.mjs BUNDLE PICTURE "question" [PICTURE "question" …]');
}
const bundle = await open(resolve(folder), { exact: !values['library-pictures'] });
const maxNewTokens = values['max-new-tokens'] && Number(values['max-new-tokens']);
for (let i = 0; i < pairs.length; i += 2) {
  const inputs = await inputsOf(bundle, pairs[i], pairs[i + 1]);
  if (values.dump) writeFileSync(join(values.dump, `${i / 2}.f32`), inputs.pixel_values.data);
  const result = await answer(bundle, inputs, maxNewTokens);
  console.log(values.json ? JSON.stringify(result) : result.text);
}
