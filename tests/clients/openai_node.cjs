// The official client for Node: chat, streams, embeddings, and what it raises. NODE_PATH says where `openai` is.
"use strict";

const assert = require("node:assert/strict");
const OpenAI = require("openai");
const { VERSION } = require("openai/version");

const env = process.env;
const model = env.PROXY_MODEL || "echo";
const messages = [{ role: "user", content: "What is the capital of France? Answer in one sentence." }];
const max_tokens = 16;

async function chat(client) {
  const ids = [];
  for await (const one of client.models.list()) ids.push(one.id);
  assert(ids.includes(model));
  const { data, request_id } = await client.chat.completions.create({ model, messages, max_tokens }).withResponse();
  assert(data.choices[0].message.content && data.usage.completion_tokens > 0);
  assert(request_id);
}

async function stream(client) {
  let text = "";
  const chunks = await client.chat.completions.create({ model, messages, max_tokens, stream: true });
  for await (const chunk of chunks) text += chunk.choices[0].delta.content ?? "";
  assert(text);
}

async function streamHelper(client) {
  const stream_options = { include_usage: true };
  const runner = client.chat.completions.stream({ model, messages, max_tokens, stream_options });
  const completion = await runner.finalChatCompletion();
  assert(completion.choices[0].message.content && completion.choices[0].finish_reason);
  assert((await runner.totalUsage()).completion_tokens > 0);
}

async function embeddings(client) {
  const made = await client.embeddings.create({ model: env.PROXY_EMBEDDING_MODEL, input: ["one text", "another"] });
  assert.equal(made.data.length, 2);
  assert(made.data[0].embedding.length > 1);
}

// name, key, model, exception, code, what its message says, how often it may be posted
const refusals = [
  ["wrong key", "sk-" + "0".repeat(43), model, OpenAI.AuthenticationError, "invalid_api_key", /\bkey\b/, 1],
  ["no credits", env.PROXY_POOR_KEY, model, OpenAI.APIError, "insufficient_credits", /\bcredits\b/, 1],
  ["unknown model", env.PROXY_KEY, "no-such-model", OpenAI.NotFoundError, "model_not_found", /no-such-model/, 1],
  ["rate limit", env.PROXY_LIMITED_KEY, model, OpenAI.RateLimitError, "rate_limit_exceeded", /minute|seconds?\b/, 1],
  ["upstream down", env.PROXY_KEY, env.PROXY_DOWN_MODEL, OpenAI.InternalServerError, "upstream_unavailable",
    /upstream|reach|connect/, 3],
];

async function refused([name, apiKey, id, raises, code, says, postsMax]) {
  if (!apiKey || !id) return console.log(`${name}: skipped, its environment variable is not set`);
  const isLimit = raises === OpenAI.RateLimitError; // a minute is too long to wait for here
  for (let round = 0; round < (isLimit ? 3 : 1); round++) {
    let posts = 0;
    const counted = (...request) => (posts++, fetch(...request));
    const maxRetries = isLimit ? 0 : 2;
    const client = new OpenAI({ baseURL: env.PROXY_BASE_URL, apiKey, maxRetries, fetch: counted });
    try {
      await client.chat.completions.create({ model: id, messages, max_tokens: 1 });
    } catch (error) {
      assert(error instanceof raises, `${name}: ${error.constructor.name} ${error}`);
      assert.equal(error.code, code);
      assert(error.requestID);
      assert.match(error.message, says);
      assert(posts <= postsMax, `${name}: posted ${posts} times`);
      return console.log(`${name}: ${error.constructor.name} after ${posts}: ${error.message}`);
    }
  }
  assert.fail(`${name}: not refused`);
}

async function main() {
  console.log(`versions: node ${process.version}, openai (npm) ${VERSION}`);
  const client = new OpenAI({ baseURL: env.PROXY_BASE_URL, apiKey: env.PROXY_KEY });
  await chat(client);
  await stream(client);
  await streamHelper(client);
  if (env.PROXY_EMBEDDING_MODEL) await embeddings(client);
  for (const refusal of refusals) await refused(refusal);
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});
