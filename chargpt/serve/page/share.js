// What is asked, as a link to this page, and as a request from elsewhere.

const FIELDS = ["model", "beside", "prompt", "n", "max_tokens", "seed", "temperature", "top_k", "top_p", "min_p"];

// The settings are in the part of the address that browsers do not send.
export function link(values) {
  const parameters = new URLSearchParams(FIELDS.filter((name) => values[name] !== "").map((name) => [name, values[name]]));
  return `${location.origin}${location.pathname}#${parameters}`;
}

export function fromLink() {
  const parameters = new URLSearchParams(location.hash.slice(1));
  return FIELDS.filter((name) => parameters.has(name)).map((name) => [name, parameters.get(name)]);
}

export function curl(request, withKey) {
  const body = JSON.stringify({ ...request, stream: true }, null, 2).replaceAll("'", "'\\''");
  const key = withKey ? ' \\\n  -H "Authorization: Bearer $CHARGPT_API_KEY"' : "";
  return `curl -N ${location.origin}/v1/completions \\\n  -H 'Content-Type: application/json'${key} \\\n  -d '${body}'\n`;
}

export function python(request, withKey) {
  const { top_k, min_p, ...known } = request;
  const extra = Object.entries({ top_k, min_p }).filter(([, value]) => value !== undefined);
  const lines = Object.entries(known).map(([name, value]) => `    ${name}=${JSON.stringify(value)},\n`);
  if (extra.length) lines.push(`    extra_body={${extra.map(([name, value]) => `"${name}": ${value}`).join(", ")}},\n`);
  return [
    withKey ? "import os\n\n" : "",
    "from openai import OpenAI\n\n",
    `client = OpenAI(base_url="${location.origin}/v1", api_key=${withKey ? 'os.environ["CHARGPT_API_KEY"]' : '"none"'})\n`,
    `answer = client.completions.create(\n${lines.join("")})\n`,
    "for choice in answer.choices:\n    print(choice.text)\n",
  ].join("");
}
