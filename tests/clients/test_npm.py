"""The npm package openai against two nodes."""
import os
import shutil
import subprocess

import pytest

FOLDER = os.environ.get("PHALANX_NPM")
SCRIPT = """
import OpenAI from "openai";
import assert from "node:assert";
const client = new OpenAI({baseURL: process.argv[2] + "/v1", apiKey: "none"});
const messages = [{role: "user", content: "Name three colours."}];
const whole = await client.chat.completions.create({model: "demo", messages, max_tokens: 24, temperature: 0});
let text = "";
for await (const chunk of await client.chat.completions.create(
  {model: "demo", messages, max_tokens: 24, temperature: 0, stream: true}))
  text += chunk.choices[0]?.delta?.content ?? "";
assert.equal(text, whole.choices[0].message.content);
const tools = [{type: "function", function: {name: "get_weather", parameters: {type: "object",
  properties: {city: {type: "string", maxLength: 12}}, required: ["city"], additionalProperties: false}}}];
const call = await client.chat.completions.create({model: "demo", messages, tools, max_tokens: 60,
  temperature: 0, tool_choice: {type: "function", function: {name: "get_weather"}}, parallel_tool_calls: false});
assert.equal(typeof JSON.parse(call.choices[0].message.tool_calls[0].function.arguments).city, "string");
const json = await client.chat.completions.create({model: "demo", messages, max_tokens: 60, temperature: 0,
  response_format: {type: "json_schema", json_schema: {name: "a", strict: true, schema: {type: "object",
    properties: {yes: {type: "boolean"}}, required: ["yes"], additionalProperties: false}}}});
assert.equal(typeof JSON.parse(json.choices[0].message.content).yes, "boolean");
const completion = await client.completions.create({model: "demo", prompt: "The capital of France is",
  max_tokens: 5, logprobs: 2, echo: true, temperature: 0});
assert.ok(completion.choices[0].text.includes("Paris") && completion.choices[0].logprobs.token_logprobs[1] < 0);
assert.equal((await client.models.list()).data[0].id, "demo");
const answer = await client.responses.create({model: "demo", input: "Hello", max_output_tokens: 8});
assert.ok(answer.output_text.length > 0);
await assert.rejects(client.chat.completions.create({model: "other", messages}), /Model not found/);
console.log("ok");
"""


@pytest.mark.skipif(not FOLDER or not shutil.which("node"), reason="needs node and npm's openai")
def test_openai_of_npm(two_nodes):
    script = os.path.join(FOLDER, "client.mjs")
    with open(script, "w", encoding="utf-8") as file:
        file.write(SCRIPT)
    done = subprocess.run(["node", script, two_nodes.url], cwd=FOLDER, text=True, timeout=300,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0 and done.stdout.strip().endswith("ok"), done.stdout
