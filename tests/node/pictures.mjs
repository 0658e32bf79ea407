// Pictures as the models saw them in training: `exactPictures` makes transformers.js give the pixel values that the
// bundle's own runtime gives.

import { RawImage, Tensor } from '@huggingface/transformers';
import { resizeLikePillow } from './pillow.mjs';

// transformers' MAX_IMAGE_SIZE for Idefics3: whatever `longest_edge` says, no picture is scaled beyond it.
const MAX_EDGE = 4096;

/**
 * Change `processor`, and how every picture is resized, in place; `config` is the model's config.json.
 *
 * LLaVA's processor is right when resizing is Pillow's. Qwen-VL's rounds halves up where training rounds to even, one
 * row of image tokens too many. Idefics3's resizes three times, two of them without `resize`, and is replaced.
 */
export function exactPictures(processor, config) {
  RawImage.prototype.resize = async function (width, height, { resample = 2 } = {}) {
    return resized(this, width, height, resample);
  };
  const images = processor.image_processor;
  if (['qwen2_vl', 'qwen2_5_vl'].includes(config.model_type)) {
    images.get_resize_output_image_size = (image) => qwenSize(image, images);
  } else if (['idefics3', 'smolvlm'].includes(config.model_type)) {
    processor.components.image_processor = async (given) => idefics3(given.flat(), images.config);
  }
}

/** A picture from a file as upright RGB, transparency laid on white. */
export async function readPicture(path) {
  const image = await RawImage.read(path);
  if (image.channels !== 4) return image.rgb();
  const { data, width, height } = image;
  const rgb = new Uint8ClampedArray(width * height * 3);
  for (let i = 0; i < width * height; ++i) {
    const alpha = data[i * 4 + 3] / 255;
    for (let c = 0; c < 3; ++c) rgb[i * 3 + c] = data[i * 4 + c] * alpha + 255 * (1 - alpha);
  }
  return new RawImage(rgb, width, height, 3);
}

function resized(image, width, height, resample) {
  const data = resizeLikePillow(image, width, height, resample);
  return new RawImage(data, width, height, image.channels);
}

/** `smart_resize` in transformers: both edges rounded to whole image tokens, or scaled into the limits. */
function qwenSize({ width, height }, { patch_size, merge_size, min_pixels, max_pixels }) {
  if (Math.max(width, height) / Math.min(width, height) > 200) throw new Error('a picture over 200 times as long as wide');
  const token = patch_size * merge_size;
  const edges = (tokensOf) => [tokensOf(width) * token, tokensOf(height) * token];
  const rounded = edges((edge) => roundHalfToEven(edge / token));
  const pixels = rounded[0] * rounded[1];
  if (pixels > max_pixels) {
    const scale = Math.sqrt((height * width) / max_pixels);
    return edges((edge) => Math.max(1, Math.floor(edge / scale / token)));
  }
  if (pixels < min_pixels) {
    const scale = Math.sqrt(min_pixels / (height * width));
    return edges((edge) => Math.ceil((edge * scale) / token));
  }
  return rounded;
}

const roundHalfToEven = (x) => (x % 2 === 0.5 ? Math.floor(x) : Math.round(x));

/** What Idefics3ImageProcessor gives, for the pictures of one prompt. */
function idefics3(images, settings) {
  const cuts = images.map((image) => cutIdefics3(image.rgb(), settings));
  const tiles = cuts.flatMap((cut) => cut.tiles);
  const edge = settings.max_image_size.longest_edge;
  const pixels = new Float32Array(tiles.length * 3 * edge * edge);
  tiles.forEach((tile, i) => pixels.set(normalised(tile, settings), i * 3 * edge * edge));
  const mask = new Tensor('bool', new Uint8Array(tiles.length * edge * edge).fill(1), [1, tiles.length, edge, edge]);
  return {
    pixel_values: new Tensor('float32', pixels, [1, tiles.length, 3, edge, edge]),
    pixel_attention_mask: mask,
    rows: [cuts.map((cut) => cut.rows)],
    cols: [cuts.map((cut) => cut.columns)],
  };
}

/** Square tiles, row by row, the overview last; 0 rows and columns where the picture is one tile. */
function cutIdefics3(image, { size, max_image_size, do_image_splitting, resample }) {
  const edge = max_image_size.longest_edge;
  image = resized(image, ...longestEdgeSize(image, size.longest_edge), resample);
  if (!do_image_splitting) return { tiles: [resized(image, edge, edge, resample)], rows: 0, columns: 0 };
  image = resized(image, ...wholeTilesSize(image, edge), resample);
  const [rows, columns] = [image.height / edge, image.width / edge];
  if (rows === 1 && columns === 1) return { tiles: [image], rows: 0, columns: 0 };
  const tiles = Array.from({ length: rows * columns }, (_, i) => tileOf(image, Math.floor(i / columns), i % columns, edge));
  return { tiles: [...tiles, resized(image, edge, edge, resample)], rows, columns };
}

function tileOf(image, row, column, edge) {
  const line = edge * image.channels;
  const data = new Uint8ClampedArray(edge * line);
  for (let y = 0; y < edge; ++y) {
    const start = ((row * edge + y) * image.width + column * edge) * image.channels;
    data.set(image.data.subarray(start, start + line), y * line);
  }
  return new RawImage(data, edge, edge, image.channels);
}

/** The longer edge is `longest`; the shorter one is truncated and then made even. */
function longestEdgeSize({ width, height }, longest) {
  const ratio = width / height;
  const even = (x) => x + (x % 2);
  const wide = width >= height;
  const [long, short] = [longest, Math.max(1, even(Math.trunc(wide ? longest / ratio : longest * ratio)))];
  return belowMaxEdge(wide ? [long, short] : [short, long]);
}

function belowMaxEdge([width, height]) {
  if (Math.max(width, height) <= MAX_EDGE) return [width, height];
  const ratio = width / height;
  if (width >= height) return [MAX_EDGE, Math.max(1, Math.trunc(MAX_EDGE / ratio))];
  return [Math.max(1, Math.trunc(MAX_EDGE * ratio)), MAX_EDGE];
}

/** Both edges rounded up to whole tiles; the shorter one follows the longer one's rounding first. */
function wholeTilesSize({ width, height }, edge) {
  const ratio = width / height;
  const whole = (x) => Math.ceil(x / edge) * edge;
  if (width >= height) return [whole(width), whole(Math.trunc(whole(width) / ratio))];
  return [whole(Math.trunc(whole(height) * ratio)), whole(height)];
}

/** Float32 channels first: rescaled in double, normalised in single precision, as transformers does. */
function normalised({ data, width, height }, { rescale_factor, image_mean, image_std }) {
  const values = new Float32Array(data.length);
  const plane = width * height;
  const [mean, std] = [Float32Array.from(image_mean), Float32Array.from(image_std)];
  for (let i = 0; i < plane; ++i) {
    for (let c = 0; c < 3; ++c) {
      values[c * plane + i] = Math.fround(Math.fround(data[i * 3 + c] * rescale_factor) - mean[c]) / std[c];
    }
  }
  return values;
}
