// One place of an answer: what could stand there, and where each head looked.

import { cut } from "./cuts.js";
import { visible } from "./answers.js";

const SHOWN = 10; // alternatives
const ENOUGH = 1000; // tokens of a distribution: all, for the vocabularies that are trained here

const HINT =
  "Point at a character of an answer, or choose one with the arrow keys. Click an alternative to branch from there.";

const element = (id) => document.getElementById(id);

export class PlacePanel {
  // choose(answer, at, token, text): somebody clicked an alternative
  constructor(look, settings, choose, failed) {
    Object.assign(this, { look, settings, choose, failed });
    this.head = null; // [layer, head], or null for their mean
    this.asking = null;
    this.clear();
  }

  async show(answer, at) {
    this.asking?.abort();
    this.asking = new AbortController();
    const { signal } = this.asking;
    this.answer = answer;
    this.at = at;
    this.found = null;
    if (at === 0) {
      element("place-about").textContent = "Nothing comes before the first token, so the model does not predict it.";
      element("candidates").replaceChildren();
      element("attention").hidden = true;
      return;
    }
    try {
      const found = await this.look({ ...answer.before(at), top: ENOUGH, attention: true }, signal);
      if (signal.aborted) return;
      this.found = found;
    } catch (error) {
      if (error.name !== "AbortError") this.failed(error);
      return;
    }
    this.draw();
    this.drawAttention();
  }

  clear() {
    this.asking?.abort();
    this.answer = this.found = null;
    element("place-about").textContent = HINT;
    element("candidates").replaceChildren();
    element("attention").hidden = true;
  }

  draw() {
    if (!this.found) return;
    const { answer, at, found } = this;
    const after = cut(found.next.map((each) => each.logprob), this.settings());
    const stands = answer.tokens[at];
    const rank = found.next.findIndex((each) => each.token === stands);
    const shown = found.next.slice(0, SHOWN).map((each, i) => ({ ...each, after: after[i] }));
    if (rank >= SHOWN) shown.push({ ...found.next[rank], after: after[rank] });
    const where = `Token ${at + 1} of answer ${answer.id}`;
    element("place-about").textContent =
      stands === undefined
        ? `${where}: the next one. Click one to write it.`
        : `${where}: ${visible(answer.texts[at])} stands here, ${rank < 0 ? "a rare choice" : `choice ${rank + 1} with ` +
          percent(Math.exp(found.next[rank].logprob))}. Click another to branch.`;
    element("candidates").replaceChildren(...shown.map((each) => this.candidate(each, each.token === stands)));
  }

  candidate({ token, text, logprob, after }, stands) {
    const item = document.createElement("li");
    const button = document.createElement("button");
    const p = Math.exp(logprob);
    button.type = "button";
    button.innerHTML = '<b></b><span class="bars"><i class="before"></i><i class="after"></i></span><span class="p"></span>';
    button.querySelector("b").textContent = text === "\ufffd" ? `#${token}` : visible(text);
    button.querySelector(".before").style.width = `${100 * p}%`;
    button.querySelector(".after").style.width = `${100 * after}%`;
    button.querySelector(".p").textContent = `${percent(p)} → ${percent(after)}`;
    button.dataset.token = token;
    if (stands) button.setAttribute("aria-current", "true");
    button.addEventListener("click", () => this.choose(this.answer, this.at, token, text));
    item.append(button);
    return item;
  }

  drawAttention() {
    if (!this.found) return;
    const { attention } = this.found;
    element("attention").hidden = !attention;
    if (!attention) return;
    const { layers, heads } = attention;
    const bytes = Uint8Array.from(atob(attention.weights), (character) => character.charCodeAt(0));
    const length = this.found.tokens.length;
    const weights = (layer, head) => bytes.subarray((layer * heads + head) * length, (layer * heads + head + 1) * length);
    if (this.head && !(this.head[0] < layers && this.head[1] < heads)) this.head = null;
    const colour = getComputedStyle(document.documentElement).getPropertyValue("--accent");

    const mean = Array.from({ length }, (_, i) => {
      let total = 0;
      for (let row = i; row < bytes.length; row += length) total += bytes[row];
      return total / (layers * heads);
    });
    const chosen = this.head ? weights(...this.head) : mean;
    element("attention-about").textContent =
      `The text that the model saw, tinted by how much ${this.head ? `layer ${this.head[0] + 1}, head ${this.head[1] + 1}` :
      "all heads together"} looked at it to predict this token. Each strip below is one head; click it to see it here.`;
    const most = Math.max(...chosen, 1);
    element("strip").replaceChildren(
      ...this.found.texts.map((text, i) => {
        const span = document.createElement("span");
        span.textContent = text;
        span.style.setProperty("--heat", `${Math.round((100 * chosen[i]) / most)}%`);
        return span;
      }),
    );
    const strips = [];
    for (let layer = 0; layer < layers; layer++) {
      for (let head = 0; head < heads; head++) {
        const on = this.head?.[0] === layer && this.head?.[1] === head;
        strips.push(this.strip(layer, head, weights(layer, head), on, colour));
      }
    }
    element("heads").style.setProperty("--columns", heads);
    const again = element("heads").contains(document.activeElement) ? document.activeElement.dataset.head : null;
    element("heads").replaceChildren(...strips);
    if (again) element("heads").querySelector(`[data-head="${again}"]`)?.focus();
  }

  strip(layer, head, weights, on, colour) {
    const button = document.createElement("button");
    const canvas = document.createElement("canvas");
    button.type = "button";
    button.title = `layer ${layer + 1}, head ${head + 1}`;
    button.dataset.head = `${layer}-${head}`;
    button.setAttribute("aria-label", button.title);
    button.setAttribute("aria-pressed", on);
    canvas.width = weights.length;
    canvas.height = 1;
    const context = canvas.getContext("2d");
    context.fillStyle = colour;
    const most = Math.max(...weights, 1);
    weights.forEach((weight, i) => {
      context.globalAlpha = weight / most;
      context.fillRect(i, 0, 1, 1);
    });
    button.append(canvas);
    button.addEventListener("click", () => {
      this.head = on ? null : [layer, head];
      this.drawAttention();
    });
    return button;
  }
}

function percent(p) {
  return p >= 0.0995 || p === 0 ? `${(100 * p).toFixed(0)} %` : `${(100 * p).toPrecision(2)} %`;
}
