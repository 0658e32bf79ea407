// Pillow's resizing, to the bit: what the models were trained on.
//
// transformers.js resizes with sharp, or with ONNX's Resize without antialiasing, and small print looks different then.
// The steps and the fixed-point rounding are those of Resample.c in Pillow 13 for 8-bit channels. Before 13, rows always
// came first: pictures that lose more than twice as many rows as columns came out a little different.

const PRECISION_BITS = 32 - 8 - 2;

const sinc = (x) => (x === 0 ? 1 : Math.sin(x * Math.PI) / (x * Math.PI));

/** [support, filter] by the number that preprocessor_config.json has under `resample`. */
const FILTERS = {
  1: [3, (x) => (-3 <= x && x < 3 ? sinc(x) * sinc(x / 3) : 0)], // lanczos
  2: [1, (x) => Math.max(0, 1 - Math.abs(x))], // bilinear
  3: [2, bicubic],
};

function bicubic(x) {
  const a = -0.5;
  x = Math.abs(x);
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
}

/** The picture {data, width, height, channels} at another size, as a new data array. */
export function resizeLikePillow({ data, width, height, channels }, newWidth, newHeight, resample) {
  if (!(resample in FILTERS)) throw new Error(`resample ${resample} is not one of 1 (lanczos), 2 (bilinear), 3 (bicubic)`);
  const filter = FILTERS[resample];
  const columnsFirst = height > newHeight && height - newHeight > (width - newWidth) * 2;
  if (columnsFirst) data = alongColumns(data, width, height, channels, newHeight, filter);
  if (newWidth !== width) data = alongRows(data, width, columnsFirst ? newHeight : height, channels, newWidth, filter);
  if (!columnsFirst && newHeight !== height) data = alongColumns(data, newWidth, height, channels, newHeight, filter);
  return data;
}

/** For each new pixel, the first old one and the integer weights from there on (precompute_coeffs). */
function weights(size, newSize, [filterSupport, filter]) {
  const scale = size / newSize;
  const filterScale = Math.max(scale, 1);
  const support = filterSupport * filterScale;
  return Array.from({ length: newSize }, (_, i) => {
    const center = (i + 0.5) * scale;
    const first = Math.max(0, Math.trunc(center - support + 0.5));
    const end = Math.min(size, Math.trunc(center + support + 0.5));
    const values = Array.from({ length: end - first }, (_, x) => filter((x + first - center + 0.5) * (1 / filterScale)));
    const sum = values.reduce((a, b) => a + b, 0);
    return [first, values.map((value) => roundHalfAway((value / sum) * (1 << PRECISION_BITS)))];
  });
}

const roundHalfAway = (x) => Math.trunc(x < 0 ? x - 0.5 : x + 0.5);

function alongRows(data, width, height, channels, newWidth, filter) {
  const result = new Uint8ClampedArray(newWidth * height * channels);
  const columns = weights(width, newWidth, filter);
  for (let y = 0; y < height; ++y) {
    for (let x = 0; x < newWidth; ++x) {
      weigh(data, result, columns[x], (y * width) * channels, channels, (y * newWidth + x) * channels, channels);
    }
  }
  return result;
}

function alongColumns(data, width, height, channels, newHeight, filter) {
  const result = new Uint8ClampedArray(width * newHeight * channels);
  const rows = weights(height, newHeight, filter);
  for (let y = 0; y < newHeight; ++y) {
    for (let x = 0; x < width; ++x) {
      weigh(data, result, rows[y], x * channels, width * channels, (y * width + x) * channels, channels);
    }
  }
  return result;
}

/** One new pixel: old ones lie `step` apart, from `from` on. The clamped array clips to 0…255. */
function weigh(data, result, [first, factors], from, step, to, channels) {
  for (let channel = 0; channel < channels; ++channel) {
    let sum = 1 << (PRECISION_BITS - 1);
    for (let i = 0; i < factors.length; ++i) sum += data[from + (first + i) * step + channel] * factors[i];
    result[to + channel] = sum >> PRECISION_BITS;
  }
}
