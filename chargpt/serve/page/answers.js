// Answers as they stand on the page: a card each, a span for each token.

const HOTTEST = 8; // bits of surprise at which the tint is full

// Tokens of the prompt and those that were written are one list, so a place is one number.
export class Answer {
  constructor(id, model, seed, parent = null, branchedAt = null) {
    Object.assign(this, { id, model, seed, parent, branchedAt });
    this.tokens = []; // ids
    this.texts = [];
    this.logprobs = []; // null for the prompt's
    this.origins = []; // how many tokens the request had as its prompt that wrote this one
    this.given = 0; // tokens of the prompt
    this.state = "waits";
    this.seconds = 0;
    this.build();
  }

  build() {
    this.card = document.createElement("article");
    this.card.setAttribute("aria-labelledby", `answer-${this.id}`);
    this.card.innerHTML = '<h2 class="small"><span class="name"></span> <small></small></h2><div class="text" tabindex="0" role="group"></div>';
    this.name = this.card.querySelector(".name");
    this.name.id = `answer-${this.id}`;
    this.name.textContent = this.title();
    this.note = this.card.querySelector("small");
    this.body = this.card.querySelector(".text");
    this.body.setAttribute("aria-label", `${this.title()}; arrow keys choose a character`);
    this.cursor = null;
  }

  title() {
    const branch = this.parent ? `, branch of ${this.parent.id} at ${this.branchedAt + 1}` : "";
    return `${this.id}: ${this.model}, seed ${this.seed}${branch}`;
  }

  prompt(tokens, texts) {
    this.given = tokens.length;
    this.add(tokens, texts, tokens.map(() => null), null);
  }

  // origin: length of the prompt of the request that wrote these; null for the prompt's own
  add(tokens, texts, logprobs, origin) {
    const fragment = document.createDocumentFragment();
    tokens.forEach((token, i) => {
      const span = document.createElement("span");
      span.textContent = texts[i];
      span.dataset.at = this.tokens.length;
      if (origin === null) span.className = "given";
      else if (logprobs[i] !== null) {
        const heat = Math.min(1, -logprobs[i] / Math.LN2 / HOTTEST);
        span.style.setProperty("--heat", `${Math.round(100 * heat)}%`);
      }
      fragment.append(span);
      this.origins.push(origin ?? this.tokens.length);
      this.tokens.push(token);
      this.texts.push(texts[i]);
      this.logprobs.push(logprobs[i]);
    });
    this.body.append(fragment); // only what is new, so that a selection stays
    this.describe();
  }

  pop() {
    this.body.lastChild.remove();
    for (const list of [this.tokens, this.texts, this.logprobs, this.origins]) list.pop();
    this.describe();
  }

  describe() {
    const known = this.logprobs.filter((logprob) => logprob !== null);
    const parts = [`${known.length} tokens`];
    if (this.seconds > 0) parts.push(`${Math.round(known.length / this.seconds).toLocaleString("en")} a second`);
    if (known.length) {
      const bits = -known.reduce((total, logprob) => total + logprob, 0) / known.length / Math.LN2;
      parts.push(`${bits.toFixed(2)} bits each`);
    }
    if (this.state !== "done") parts.push(this.state);
    this.note.textContent = parts.join(" · ");
  }

  become(state) {
    this.state = state;
    this.describe();
  }

  mark(at) {
    this.cursor?.classList.remove("cursor");
    this.cursor = at === null ? null : (this.body.children[at] ?? null);
    this.cursor?.classList.add("cursor");
    this.cursor?.scrollIntoView({ block: "nearest" });
  }

  // What the server is asked about a place: the tokens before it, as the model held them when it wrote there.
  before(at) {
    const origin = this.origins[at] ?? at;
    return { model: this.model, prompt: this.tokens.slice(0, origin), written: this.tokens.slice(origin, at) };
  }
}

// Characters that would not be seen.
export function visible(text) {
  return { "\n": "⏎", "\t": "⇥", " ": "␣", "": "…" }[text] ?? text;
}
