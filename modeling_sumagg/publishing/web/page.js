// The page: what a user does becomes messages to the worker, and its answers become text and numbers.
const $ = (id) => document.getElementById(id);
const worker = new Worker("worker.js", { type: "module" });
let writing = false;
let begun = false;
// The text stands in blocks, so that what is added lays out only the last one anew. A block ends behind a word.
const BLOCK_LENGTH = 4000;
let block = null; // the text node of the last one

function show(state) {
  writing = state === "writing";
  $("write").textContent = writing ? "Pause" : begun ? "Continue" : "Write";
  $("write").disabled = state === "loading";
  for (const id of ["again", "save"]) $(id).disabled = state === "loading" || writing || !begun;
  $("restore").disabled = state === "loading" || writing;
  $("prompt").disabled = state === "loading" || begun;
}

function append(text) {
  const box = $("text");
  // Whoever has scrolled up reads on undisturbed.
  const atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
  for (const word of text.match(/\S{0,1000}\s?/gu)) {
    if (block.length > 2 * BLOCK_LENGTH || (block.length > BLOCK_LENGTH && /\s$/.test(block.data))) addBlock();
    block.appendData(word);
  }
  if (atEnd) box.scrollTop = box.scrollHeight;
}

function addBlock(...before) {
  const element = document.createElement("div");
  block = document.createTextNode("");
  element.append(...before, block);
  $("text").append(element);
}

function begin(prompt, text) {
  begun = true;
  const bold = document.createElement("b");
  bold.textContent = prompt;
  $("text").replaceChildren();
  addBlock(bold);
  append(text);
}

// What follows the prompt.
const written = () => Array.from($("text").children, (element) => element.lastChild.data).join("");

function toggle() {
  if ($("write").disabled) return;
  if (writing) return worker.postMessage({ type: "pause" });
  if (begun) worker.postMessage({ type: "write" });
  else {
    begin($("prompt").value, "");
    worker.postMessage({ type: "begin", prompt: $("prompt").value });
  }
  show("writing");
  $("status").textContent = "Writing.";
}

const answers = {
  ready({ manifest }) {
    const { name, state_bytes, generation } = manifest;
    document.title = $("name").textContent = name;
    $("bytes").textContent = (state_bytes / 1024).toLocaleString("en", { maximumFractionDigits: 1 });
    $("temperature").value = generation.do_sample ? generation.temperature : 0;
    temperature();
    $("status").textContent = "Ready. Nothing leaves this device.";
    show("ready");
  },
  text({ text, tokens, speed, length }) {
    append(text);
    if (speed) $("speed").textContent = speed < 10 ? speed.toFixed(1) : Math.round(speed).toLocaleString("en");
    $("length").textContent = length.toLocaleString("en");
    document.dispatchEvent(new CustomEvent("tokens", { detail: tokens }));
    worker.postMessage({ type: "shown" });
  },
  stopped({ reason }) {
    $("status").textContent = reason;
    show("ready");
  },
  saved({ bytes, length }) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([bytes]));
    link.download = `state-${length}.safetensors`;
    link.click();
    URL.revokeObjectURL(link.href);
    $("status").textContent = `Saved the state after ${length.toLocaleString("en")} tokens.`;
  },
  restored({ prompt, text, length }) {
    begin(prompt, text);
    $("prompt").value = prompt;
    $("length").textContent = length.toLocaleString("en");
    $("status").textContent = `Restored the state after ${length.toLocaleString("en")} tokens.`;
    show("ready");
  },
  failed({ task, message }) {
    $("status").textContent = message;
    if (task === "begin") begun = false;
    show(task === "load" ? "loading" : "ready");
  },
};

function temperature() {
  const value = Number($("temperature").value);
  $("shown").textContent = value === 0 ? "0, likeliest" : value.toFixed(1);
  worker.postMessage({ type: "temperature", value });
}

worker.onmessage = ({ data }) => answers[data.type](data);
worker.onerror = (event) => answers.failed({ task: "load", message: `The worker failed: ${event.message}` });
$("write").onclick = toggle;
$("temperature").oninput = temperature;
$("again").onclick = () => {
  begun = false;
  $("text").replaceChildren();
  $("length").textContent = "0";
  $("speed").textContent = "–";
  $("status").textContent = "Ready.";
  show("ready");
  $("prompt").focus();
};
$("save").onclick = () => worker.postMessage({ type: "save", prompt: $("prompt").value, text: written() });
$("restore").onclick = () => $("file").click();
$("file").onchange = async () => {
  const [file] = $("file").files;
  $("file").value = "";
  if (file) worker.postMessage({ type: "restore", bytes: await file.arrayBuffer() });
};
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) toggle();
  else if (event.key === "Escape" && writing) toggle();
  else return;
  event.preventDefault();
});
show("loading");
