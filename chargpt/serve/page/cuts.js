// What temperature, top-k, top-p and min-p leave of a distribution: as `next_token_probabilities` in sampler.py does it.

// logprobs: of all tokens, the likeliest first. Returns probabilities in the same order.
export function cut(logprobs, { temperature, top_k, top_p, min_p }) {
  if (temperature === 0) return logprobs.map((_, i) => (i === 0 ? 1 : 0));
  let kept = normalised(logprobs.map((logprob) => Math.exp((logprob - logprobs[0]) / temperature)));
  if (top_k) kept = kept.map((p, i) => (i < top_k ? p : 0));
  if (top_p < 1) {
    const enough = top_p * sum(kept);
    let before = 0;
    kept = kept.map((p) => {
      const stays = before < enough ? p : 0;
      before += p;
      return stays;
    });
  }
  if (min_p) kept = kept.map((p) => (p < min_p * kept[0] ? 0 : p));
  return normalised(kept);
}

function sum(numbers) {
  return numbers.reduce((total, number) => total + number, 0);
}

function normalised(numbers) {
  const total = sum(numbers);
  return numbers.map((number) => number / total);
}
