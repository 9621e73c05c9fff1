// The page: what was asked, the answers to it, and the way back.

import { Answer, visible } from "./answers.js";
import { PlacePanel } from "./place.js";
import { Problem, completions, hasKey, look, models, useKey } from "./server.js";
import { curl, fromLink, link, python } from "./share.js";

const element = (id) => document.getElementById(id);
const SLIDERS = ["temperature", "top_k", "top_p", "min_p"];
const HOVER = 60; // ms that the pointer rests before the server is asked

let answers = []; // in the order in which they stand on the page
let past = []; // functions that undo
let made = 0; // answers since the page was opened
let current = null; // the answer that is looked at
let at = null; // the place in it
let pinned = false; // a place was chosen, so the pointer changes nothing
let writing = null; // an AbortController while something is written

// ------------------------------------------------------------------------------------------------------- what is asked

function settings() {
  return Object.fromEntries(SLIDERS.map((name) => [name, Number(element(name).value)]));
}

function request(model, prompt, seed, n, max_tokens) {
  const { temperature, top_k, top_p, min_p } = settings();
  const content = { model, prompt, n, max_tokens, seed, temperature, top_p };
  return { ...content, ...(top_k ? { top_k } : {}), ...(min_p ? { min_p } : {}) };
}

function seedNow() {
  const given = element("seed").value;
  return given === "" ? crypto.getRandomValues(new Uint32Array(1))[0] >>> 1 : Number(given);
}

// ------------------------------------------------------------------------------------------------------------- writing

// Streams one request into answers that stand on the page already.
async function stream(content, into, signal) {
  const start = performance.now();
  const before = into.map((answer) => answer.seconds); // an answer may grow by several requests
  const origins = [];
  for (const answer of into) answer.become("is written");
  try {
    for await (const choice of completions(content, signal)) {
      const answer = into[choice.index];
      if (choice.prompt_token_ids) {
        origins[choice.index] = choice.prompt_token_ids.length;
        if (answer.tokens.length === 0) answer.prompt(choice.prompt_token_ids, choice.prompt_token_texts);
      }
      answer.seconds = before[choice.index] + (performance.now() - start) / 1000;
      answer.add(choice.token_ids, choice.token_texts, choice.logprobs.token_logprobs, origins[choice.index]);
      if (choice.finish_reason) answer.become("done");
    }
  } catch (error) {
    for (const answer of into) if (answer.state !== "done") answer.become("stopped");
    if (error.name !== "AbortError") throw error;
  }
}

// Runs `work` with buttons as they are while something is written; says what went wrong.
async function busy(work) {
  if (writing) return;
  element("problem").hidden = true;
  writing = new AbortController();
  update();
  try {
    await work(writing.signal);
  } catch (error) {
    failed(error);
  } finally {
    writing = null;
    update();
  }
}

function failed(error) {
  if (!(error instanceof Problem)) console.error(error);
  if (error.status === 401) askForKey();
  element("problem").textContent = error.message;
  element("problem").hidden = false;
}

function write() {
  return busy(async (signal) => {
    const first = seedNow();
    const n = Number(element("n").value);
    const chosen = [element("model").value, element("beside").value].filter((name) => name !== "");
    const before = answers;
    answers = [];
    past.push(() => (answers = before));
    const byModel = chosen.map(() => []);
    for (let i = 0; i < n; i++) chosen.forEach((model, m) => byModel[m].push(add(model, first + i)));
    focus(answers[0], null);
    place.clear();
    show();
    const count = Number(element("max_tokens").value);
    const asked = chosen.map((model, m) => request(model, element("prompt").value, first, n, count));
    const ended = await Promise.allSettled(asked.map((content, m) => stream(content, byModel[m], signal)));
    const problem = ended.find(({ status }) => status === "rejected");
    if (problem) throw problem.reason;
  });
}

function add(model, seed, parent = null, branchedAt = null) {
  const answer = new Answer(++made, model, seed, parent, branchedAt);
  const last = parent ? lastBelow(parent) : answers.length - 1;
  answers = answers.toSpliced(last + 1, 0, answer);
  return answer;
}

// Where the last branch of an answer stands.
function lastBelow(answer) {
  const below = (other) => other === answer || (other.parent !== null && below(other.parent));
  return answers.findLastIndex(below);
}

// One token at the end of the answer in view; a new answer where there is none.
function step() {
  return busy(async (signal) => {
    let answer = answers.includes(current) ? current : null;
    const before = answers;
    if (!answer) {
      answers = [];
      answer = add(element("model").value, seedNow());
      past.push(() => (answers = before));
      show();
    }
    const prompt = answer.tokens.length ? answer.tokens : element("prompt").value;
    // A seed draws the same number at the same place of an answer, and each of these is the first of its own.
    const seed = answer.seed + answer.tokens.length - answer.given;
    const more = answer.tokens.length > 0;
    await stream(request(answer.model, prompt, seed, 1, 1), [answer], signal);
    if (more) past.push(() => answer.pop());
    choose(answer, answer.tokens.length);
  });
}

// An alternative was clicked: at the end it is written, elsewhere a branch begins with it.
function take(answer, where, token, text) {
  if (writing) return;
  if (where === answer.tokens.length) {
    answer.add([token], [text], [place.found.next.find((each) => each.token === token).logprob], where);
    past.push(() => answer.pop());
    choose(answer, answer.tokens.length);
    update();
    return;
  }
  busy(async (signal) => {
    const before = answers;
    const branch = add(answer.model, answer.seed, answer, where);
    past.push(() => (answers = before));
    branch.prompt([...answer.tokens.slice(0, where), token], [...answer.texts.slice(0, where), text]);
    show();
    choose(branch, where);
    await stream(request(branch.model, branch.tokens, branch.seed, 1, Number(element("max_tokens").value)), [branch], signal);
  });
}

function undo() {
  if (writing || past.length === 0) return;
  past.pop()();
  if (!answers.includes(current)) focus(answers[0] ?? null, null);
  place.clear();
  show();
}

// ------------------------------------------------------------------------------------------------------------- showing

const place = new PlacePanel(look, settings, take, failed);

function show() {
  element("answers").replaceChildren(...answers.map((answer) => answer.card));
  element("branches").hidden = answers.length === 0;
  const branchesOf = (parent) => answers.filter((answer) => answer.parent === parent || (parent === null && !answers.includes(answer.parent)));
  const list = (parent) => branchesOf(parent).map((answer) => entry(answer, list(answer)));
  element("tree").replaceChildren(...list(null));
  update();
}

function entry(answer, below) {
  const item = document.createElement("li");
  const button = document.createElement("button");
  button.type = "button";
  const from = answer.parent
    ? `${answer.id}: at ${answer.branchedAt + 1} ${visible(answer.parent.texts[answer.branchedAt] ?? "")} → ${visible(answer.texts[answer.branchedAt] ?? "")}`
    : answer.title();
  button.textContent = from;
  button.addEventListener("click", () => {
    answer.card.scrollIntoView({ block: "nearest" });
    answer.body.focus();
  });
  item.append(button);
  if (below.length) {
    const list = document.createElement("ul");
    list.append(...below);
    item.append(list);
  }
  return item;
}

function update() {
  for (const id of ["step", "undo"]) element(id).disabled = writing !== null;
  document.querySelector("#ask .first").disabled = writing !== null || element("model").value === "";
  element("step").disabled ||= element("model").value === "";
  element("undo").disabled ||= past.length === 0;
  element("stop").disabled = writing === null;
  element("answers").setAttribute("aria-busy", writing !== null);
}

// The answer and the place that are looked at.
function focus(answer, place) {
  current?.mark(null);
  for (const other of answers) other.card.classList.toggle("current", other === answer);
  current = answer;
  at = place;
  answer?.mark(place);
}

function choose(answer, where) {
  pinned = true;
  focus(answer, where);
  return place.show(answer, where);
}

function spanOf(event) {
  const span = event.target.closest?.("[data-at]");
  const answer = span && answers.find((each) => each.body === span.parentNode);
  return answer ? [answer, Number(span.dataset.at)] : null;
}

let resting = null;
element("answers").addEventListener("pointerover", (event) => {
  const found = spanOf(event);
  clearTimeout(resting);
  if (!found || pinned || event.pointerType !== "mouse") return;
  resting = setTimeout(() => {
    focus(...found);
    place.show(...found);
  }, HOVER);
});
element("answers").addEventListener("click", (event) => {
  const found = spanOf(event);
  if (found) choose(...found);
});
element("answers").addEventListener("focusin", (event) => {
  const answer = answers.find((each) => each.body === event.target);
  if (answer && answer !== current) focus(answer, null);
});
element("answers").addEventListener("keydown", (event) => {
  const answer = answers.find((each) => each.body === event.target);
  if (!answer || event.ctrlKey || event.altKey || event.metaKey) return;
  const here = current === answer && at !== null ? at : answer.given - (event.key === "ArrowRight" ? 1 : 0);
  const end = answer.tokens.length;
  const moves = { ArrowLeft: here - 1, ArrowRight: here + 1, Home: 0, End: end };
  if (event.key in moves) {
    event.preventDefault();
    choose(answer, Math.min(Math.max(moves[event.key], 0), end));
  } else if (event.key === "Enter") {
    event.preventDefault();
    element("candidates").querySelector("button")?.focus();
  }
});
document.addEventListener("keydown", (event) => {
  const inField = /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName);
  if (event.key === "Escape" && !element("share").open) pinned = false;
  else if (event.key === "Enter" && event.ctrlKey) element("ask").requestSubmit();
  else if (event.key === "z" && event.ctrlKey && !inField) undo();
  else return;
  if (event.key !== "Escape") event.preventDefault();
});

// ------------------------------------------------------------------------------------------------------ fields, sharing

function drawSliders() {
  for (const name of SLIDERS) {
    const value = Number(element(name).value);
    const off = (name === "top_k" && value === 0) || (name === "min_p" && value === 0) || (name === "top_p" && value === 1);
    document.querySelector(`output[for=${name}]`).value = off ? "off" : value;
  }
  place.draw();
}

function values() {
  const names = ["model", "beside", "prompt", "n", "max_tokens", ...SLIDERS];
  const seed = element("seed").value || (answers[0]?.seed ?? "");
  return { ...Object.fromEntries(names.map((name) => [name, element(name).value])), seed: String(seed) };
}

function share(title, text) {
  element("share-title").textContent = title;
  element("share-text").value = text;
  element("share").showModal();
  element("share-text").select();
}

function shared() {
  const { model, prompt, seed, n, max_tokens } = values();
  return request(model, prompt, seed === "" ? seedNow() : Number(seed), Number(n), Number(max_tokens));
}

element("share-link").addEventListener("click", () => share("A link to this prompt, seed and settings", link(values())));
element("share-curl").addEventListener("click", () => share("The same with curl", curl(shared(), hasKey())));
element("share-python").addEventListener("click", () => share("The same in Python", python(shared(), hasKey())));
element("copy").addEventListener("click", async () => {
  element("share-text").select();
  await navigator.clipboard.writeText(element("share-text").value).catch(() => document.execCommand("copy"));
  element("copy").textContent = "Copied";
  setTimeout(() => (element("copy").textContent = "Copy"), 1500);
});

element("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  pinned = false;
  write();
});
element("step").addEventListener("click", step);
element("stop").addEventListener("click", () => writing?.abort());
element("undo").addEventListener("click", undo);
element("tint").addEventListener("change", () => element("answers").classList.toggle("tint", element("tint").checked));
for (const name of SLIDERS) element(name).addEventListener("input", drawSliders);

// --------------------------------------------------------------------------------------------------------------- begin

function askForKey() {
  element("key-form").hidden = false;
  element("key").focus();
}

element("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(element("key").value);
  element("key").value = "";
  element("key-form").hidden = true;
  begin();
});

function restore() {
  for (const [name, value] of fromLink()) {
    const field = element(name);
    const fits =
      field.tagName === "SELECT"
        ? [...field.options].some((option) => option.value === value)
        : field.tagName === "TEXTAREA" || (value !== "" && Number.isFinite(Number(value)));
    if (fits) field.value = value;
  }
  drawSliders();
}

async function begin() {
  element("problem").hidden = true;
  try {
    const names = await models();
    element("model").replaceChildren(...names.map((name) => new Option(name, name)));
    element("beside").replaceChildren(new Option("nothing", ""), ...names.map((name) => new Option(name, name)));
    restore();
  } catch (error) {
    failed(error);
  }
  update();
}

window.addEventListener("hashchange", restore);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => place.drawAttention());
drawSliders();
begin();
