// Asks a question with tools through OpenCode's own client package, as a configuration says.
// node tool_call.mjs PACKAGES CONFIGURATION REQUEST RESULT; prints {call, text} as JSON.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";

const [packages, configuration, request, result] = process.argv.slice(2);
const require = createRequire(`${packages}/`);
const { generateText, jsonSchema, stepCountIs, tool } = require("ai");
const { createOpenAICompatible } = require("@ai-sdk/openai-compatible");

const resolved = readFileSync(configuration, "utf8")
  .replace(/\{env:([^}]+)\}/g, (_, name) => process.env[name] ?? "")
  .replace(/\{file:([^}]+)\}/g, (_, path) => readFileSync(path, "utf8").trim());
const [[name, provider]] = Object.entries(JSON.parse(resolved).provider);
const [model] = Object.keys(provider.models);
const asked = JSON.parse(request);
const tools = asked.tools.map(({ function: { name, parameters } }) => [
  name,
  tool({ inputSchema: jsonSchema(parameters), execute: async () => result }),
]);
const answer = await generateText({
  model: createOpenAICompatible({ name, ...provider.options })(model),
  messages: asked.messages,
  tools: Object.fromEntries(tools),
  temperature: 0,
  maxOutputTokens: provider.models[model].limit.output,
  maxRetries: 0,
  stopWhen: stepCountIs(2),
});
const [call] = answer.steps[0].toolCalls;
console.log(JSON.stringify({ call: call && [call.toolName, call.input], text: answer.text }));
