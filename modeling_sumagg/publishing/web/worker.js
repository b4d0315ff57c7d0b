// The worker: it holds the graphs and the state, reads a prompt in segments and writes token by token.
import * as ort from "./ort.wasm.bundle.min.mjs";
import { Tokenizer } from "./tokenizers.min.mjs";

// Threads would need headers that a plain file server does not send.
ort.env.wasm.numThreads = 1;
ort.env.wasm.wasmPaths = { wasm: new URL("ort-wasm-simd-threaded.wasm", import.meta.url).href };

const ARRAYS = { float32: Float32Array, float64: Float64Array, int64: BigInt64Array, bool: Uint8Array };
const TYPES = { float32: "F32", float64: "F64", int64: "I64", bool: "BOOL" };
const MILLISECONDS_BETWEEN_MESSAGES = 30;

let manifest, tokenizer, prefill, decode;
let state = null; // the tensors of the state, by name
let seen = new Set(); // the tokens that the repetition penalty knows, at most the vocabulary
let logits = null; // after the last token that was read
let random = 1;
let temperature = 0;
let writing = false;
let waiting = false; // whether the page has yet to show the last text; it gets no more before that
let tail = []; // the last tokens, of which the first `shown` are in the text
let shown = 0;

async function json(name) {
  return (await fetch(new URL(name, import.meta.url))).json();
}

async function load() {
  manifest = await json("manifest.json");
  tokenizer = new Tokenizer(await json("tokenizer.json"), await json("tokenizer_config.json"));
  const weights = new Uint8Array(await (await fetch(new URL("weights.bin", import.meta.url))).arrayBuffer());
  const externalData = [{ path: "weights.bin", data: weights }];
  const open = (name) =>
    ort.InferenceSession.create(new URL(name, import.meta.url).href, { externalData, executionProviders: ["wasm"] });
  prefill = await open("prefill.onnx");
  decode = await open("decode.onnx");
  postMessage({ type: "ready", manifest });
}

function begin() {
  state = {};
  for (const { name, dtype, shape } of manifest.state) {
    const size = shape.reduce((a, b) => a * b, 1);
    state[name] = new ort.Tensor(dtype, new ARRAYS[dtype](size), shape);
  }
  seen = new Set();
  random = 1;
  tail = [];
  shown = 0;
}

const length = () => Number(state[manifest.length].data[0]);

async function read(tokens) {
  if (manifest.max_length !== null && length() + tokens.length > manifest.max_length)
    throw new Error(`The model reads ${manifest.max_length} tokens at most.`);
  for (let start = 0; start < tokens.length; start += manifest.segment_length) {
    const segment = tokens.slice(start, start + manifest.segment_length);
    const ids = new ort.Tensor("int64", BigInt64Array.from(segment, BigInt), [1, segment.length]);
    const outputs = await (segment.length === 1 ? decode : prefill).run({ input_ids: ids, ...state });
    logits = outputs.logits.data;
    for (const name of Object.keys(state)) state[name] = outputs[`after.${name}`];
  }
  tokens.forEach((token) => seen.add(token));
}

// The generator mulberry32: its whole state is one number, which is saved with the text.
function uniform() {
  random = (random + 0x6d2b79f5) >>> 0;
  let t = Math.imul(random ^ (random >>> 15), random | 1);
  t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
  return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
}

// The next token, in the order of `generate`: penalty, then the likeliest or a sample of the likeliest ones.
function choose() {
  const { repetition_penalty: penalty, top_k, top_p } = manifest.generation;
  const scores = Float64Array.from(logits);
  if (penalty !== 1) for (const token of seen) scores[token] *= scores[token] < 0 ? penalty : 1 / penalty;
  if (temperature === 0) return scores.reduce((best, score, i) => (score > scores[best] ? i : best), 0);
  const order = Array.from(scores.keys()).sort((a, b) => scores[b] - scores[a]);
  const kept = order.slice(0, top_k || order.length);
  let weights = kept.map((token) => Math.exp((scores[token] - scores[kept[0]]) / temperature));
  const total = weights.reduce((a, b) => a + b);
  let before = 0;
  weights = weights.map((weight) => {
    const inside = before < top_p * total;
    before += weight;
    return inside ? weight : 0;
  });
  let left = uniform() * weights.reduce((a, b) => a + b);
  const chosen = weights.findIndex((weight) => (left -= weight) < 0);
  return kept[Math.max(chosen, 0)];
}

// The text that a token adds. Few tokens are kept: those since the last whole character, and those shown before them.
function textOf(token) {
  tail.push(token);
  const options = { skip_special_tokens: true };
  const before = tokenizer.decode(tail.slice(0, shown), options);
  const whole = tokenizer.decode(tail, options);
  if (whole.endsWith("\ufffd") && tail.length < shown + 8) return "";
  tail = tail.slice(shown);
  shown = tail.length;
  return whole.slice(before.length);
}

// A message can arrive only between two tasks.
const channel = new MessageChannel();
const nextTask = () => new Promise((resolve) => ((channel.port1.onmessage = resolve), channel.port2.postMessage(0)));

async function write() {
  let [text, tokens, sent, speed] = ["", [], performance.now(), null];
  const send = () => {
    const now = performance.now();
    const current = (1000 * tokens.length) / (now - sent);
    // The average of about the last second.
    if (tokens.length) speed = speed === null ? current : speed + (current - speed) * Math.min(1, (now - sent) / 1000);
    postMessage({ type: "text", text, tokens, length: length(), speed });
    [text, tokens, sent, waiting] = ["", [], now, true];
  };
  send();
  let reason = "Paused.";
  try {
    while (writing) {
      const token = choose();
      await read([token]);
      tokens.push(token);
      text += textOf(token);
      if (performance.now() - sent > MILLISECONDS_BETWEEN_MESSAGES) {
        if (!waiting) send();
        await nextTask();
      }
      if (manifest.eos_token_ids.includes(token)) {
        reason = "The text has ended. It can be continued.";
        break;
      }
    }
  } catch (error) {
    reason = error.message;
  }
  writing = false;
  send();
  postMessage({ type: "stopped", reason });
}

// A safetensors file: the length of a JSON header, the header, the tensors.
function save({ prompt, text }) {
  const parts = { ...state, logits: new ort.Tensor("float32", logits, [logits.length]) };
  const about = { fingerprint: manifest.fingerprint, prompt, text, random, tail, shown, seen: [...seen] };
  const header = { __metadata__: { page: JSON.stringify(about) } };
  let end = 0;
  for (const [name, { type, dims, data }] of Object.entries(parts)) {
    header[name] = { dtype: TYPES[type], shape: dims, data_offsets: [end, end + data.byteLength] };
    end += data.byteLength;
  }
  let head = new TextEncoder().encode(JSON.stringify(header));
  const padded = new Uint8Array(Math.ceil(head.length / 8) * 8).fill(32);
  padded.set(head);
  const bytes = new Uint8Array(8 + padded.length + end);
  new DataView(bytes.buffer).setBigUint64(0, BigInt(padded.length), true);
  bytes.set(padded, 8);
  for (const [name, { data }] of Object.entries(parts))
    bytes.set(new Uint8Array(data.buffer, data.byteOffset, data.byteLength), 8 + padded.length + header[name].data_offsets[0]);
  postMessage({ type: "saved", bytes, length: length() });
}

function restore({ bytes }) {
  let header, about, start;
  try {
    start = 8 + Number(new DataView(bytes).getBigUint64(0, true));
    header = JSON.parse(new TextDecoder().decode(new Uint8Array(bytes, 8, start - 8)));
    about = JSON.parse(header.__metadata__.page);
  } catch {
    throw new Error("The file holds no state that this page saved.");
  }
  if (about.fingerprint !== manifest.fingerprint) throw new Error("The state is of another model.");
  const tensor = (name, dtype, shape) => {
    const [from, to] = header[name].data_offsets;
    return new ort.Tensor(dtype, new ARRAYS[dtype](bytes.slice(start + from, start + to)), shape);
  };
  const restored = {};
  for (const { name, dtype, shape } of manifest.state) restored[name] = tensor(name, dtype, shape);
  logits = tensor("logits", "float32", [manifest.vocab_size]).data;
  state = restored;
  seen = new Set(about.seen);
  ({ random, tail, shown } = about);
  postMessage({ type: "restored", prompt: about.prompt, text: about.text, length: length() });
}

const tasks = {
  async begin({ prompt }) {
    begin();
    const tokens = tokenizer.encode(prompt).ids;
    if (!tokens.length) throw new Error("Begin with at least one token.");
    tail = tokens.slice(-4);
    shown = tail.length;
    await read(tokens);
    await write();
  },
  write,
  save,
  restore,
};

// One task after the other; what acts at once is no task.
const fail = (task) => (error) => postMessage({ type: "failed", task, message: error.message });
let queue = load();
queue.catch(fail("load"));
onmessage = ({ data }) => {
  if (data.type === "shown") return void (waiting = false);
  writing = data.type === "begin" || data.type === "write" || (writing && data.type !== "pause");
  if (data.type === "temperature") temperature = data.value;
  else if (data.type in tasks) queue = queue.then(() => tasks[data.type](data)).catch(fail(data.type));
};
