// Noise by the student's seed convention (chacha8-box-muller-v1): image k of a seed is the image that the command line,
// the server and every other engine make of it.

const rotate = (v, n) => (v << n) | (v >>> (32 - n));

function quarter(x, a, b, c, d) {
  x[a] = (x[a] + x[b]) | 0; x[d] = rotate(x[d] ^ x[a], 16);
  x[c] = (x[c] + x[d]) | 0; x[b] = rotate(x[b] ^ x[c], 12);
  x[a] = (x[a] + x[b]) | 0; x[d] = rotate(x[d] ^ x[a], 8);
  x[c] = (x[c] + x[d]) | 0; x[b] = rotate(x[b] ^ x[c], 7);
}

/** Sixteen words of the ChaCha8 stream of this key (8 words) at a block number. */
function block(key, number) {
  const start = Int32Array.of(0x61707865, 0x3320646e, 0x79622d32, 0x6b206574, ...key, number, 0, 0, 0);
  const x = start.slice();
  for (let round = 0; round < 4; round++) {
    quarter(x, 0, 4, 8, 12); quarter(x, 1, 5, 9, 13); quarter(x, 2, 6, 10, 14); quarter(x, 3, 7, 11, 15);
    quarter(x, 0, 5, 10, 15); quarter(x, 1, 6, 11, 12); quarter(x, 2, 7, 8, 13); quarter(x, 3, 4, 9, 14);
  }
  return Uint32Array.from(x, (v, i) => v + start[i]);
}

/** `length` standard normal values of image `index` of a seed. */
export function imageNoise(seed, index, length) {
  const bytes = new Uint8Array(32);
  const view = new DataView(bytes.buffer);
  view.setBigUint64(0, BigInt(seed), true);
  view.setBigUint64(8, BigInt(index), true);
  bytes.set(new TextEncoder().encode("noise"), 16);
  const key = new Int32Array(bytes.buffer);
  const out = new Float32Array(length + 1);
  for (let filled = 0, number = 0; filled < length; number++) {
    const words = block(key, number);
    for (let k = 0; k < 16 && filled < length; k += 2, filled += 2) {
      const radius = Math.sqrt(-2 * Math.log((words[k] + 1) / 2 ** 32));
      const angle = (2 * Math.PI * words[k + 1]) / 2 ** 32;
      out[filled] = radius * Math.cos(angle);
      out[filled + 1] = radius * Math.sin(angle);
    }
  }
  return out.subarray(0, length);
}
