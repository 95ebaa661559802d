// Clients of JavaScript against a server of `nano`: Vercel's AI SDK, OpenAI's agents and LangChain, over chat and Responses.

import assert from "node:assert/strict";
import { test } from "node:test";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { tool as langchainTool } from "@langchain/core/tools";
import { ChatOpenAI } from "@langchain/openai";
import { Agent, run, setDefaultOpenAIClient, setOpenAIAPI, setTracingDisabled, tool as agentTool } from "@openai/agents";
import { generateObject, generateText, Output, stepCountIs, streamText, tool } from "ai";
import OpenAI from "openai";
import { z } from "zod";

const baseURL = `${process.env.TEST_SERVER_URL}/v1`;
const name = process.env.TEST_SERVER_MODEL ?? "gpt-oss-nano";
const key = { apiKey: "none" };
const City = z.object({ name: z.string(), population: z.number() });
const cityAsked = "Give me JSON with name Paris and population 200";
const weatherAsked = "What is the weather in Paris?";
const place = z.object({ city: z.string() });
const about = "Get the weather in a city.";

const openai = createOpenAI({ baseURL, ...key });
const compatible = createOpenAICompatible({ name: "local", baseURL, ...key, supportsStructuredOutputs: true, includeUsage: true });
const models = { responses: openai.responses(name), chat: openai.chat(name), compatible: compatible(name) };

for (const [api, model] of Object.entries(models)) {
  const asked = [];
  const execute = async ({ city }) => (asked.push(city), "18 degrees and sun");
  const tools = { get_weather: tool({ description: about, inputSchema: place, execute }) };
  const loop = { model, prompt: weatherAsked, tools, stopWhen: stepCountIs(3), maxRetries: 0 };

  test(`AI SDK, ${api}: a tool's result is answered from`, async () => {
    const { text, steps } = await generateText(loop);
    assert.equal(steps.length, 2);
    assert.match(text, /18 degrees/);
    assert.deepEqual(asked.splice(0), ["Paris"]);
  });

  test(`AI SDK, ${api}: the same, streamed`, async () => {
    const failures = [];
    const result = streamText({ ...loop, onError: ({ error }) => failures.push(error) });
    const kinds = new Set();
    for await (const part of result.fullStream) kinds.add(part.type);
    assert.deepEqual(failures, []);
    assert.ok(["tool-call", "tool-result", "text-delta", "finish"].every((kind) => kinds.has(kind)));
    assert.match(await result.text, /18 degrees/);
    assert.ok((await result.totalUsage).outputTokens > 0);
  });

  test(`AI SDK, ${api}: structured output`, async () => {
    const { object } = await generateObject({ model, schema: City, prompt: cityAsked });
    assert.deepEqual(object, { name: "Paris", population: 200 });
    const prompt = "Give me a JSON array of red, green";
    const { output } = await generateText({ model, output: Output.array({ element: z.string() }), prompt });
    assert.deepEqual(output, ["red", "green"]);
  });
}

function choose(api) {
  setTracingDisabled(true);
  setDefaultOpenAIClient(new OpenAI({ baseURL, ...key, maxRetries: 0 }));
  setOpenAIAPI(api);
}

for (const api of ["responses", "chat_completions"]) {
  const tools = [agentTool({ name: "get_weather", description: about, parameters: place, execute: async () => "18 degrees" })];
  const agent = new Agent({ name: "Helper", model: name, tools });

  test(`OpenAI agents, ${api}: a tool's result is answered from`, async () => {
    choose(api);
    assert.match((await run(agent, weatherAsked)).finalOutput, /18 degrees/);
    const streamed = await run(agent, weatherAsked, { stream: true });
    await streamed.completed;
    assert.match(streamed.finalOutput, /18 degrees/);
  });

  test(`OpenAI agents, ${api}: structured output`, async () => {
    choose(api);
    const { finalOutput } = await run(new Agent({ name: "Writer", model: name, outputType: City }), cityAsked);
    assert.deepEqual(finalOutput, { name: "Paris", population: 200 });
  });
}

test("OpenAI agents go on from a response's id", async () => {
  choose("responses");
  const agent = new Agent({ name: "Helper", model: name });
  const { lastResponseId } = await run(agent, "My name is Carol.");
  const { finalOutput } = await run(agent, "What is my name?", { previousResponseId: lastResponseId });
  assert.match(finalOutput, /Carol/);
});

for (const useResponsesApi of [false, true]) {
  const model = new ChatOpenAI({ model: name, ...key, useResponsesApi, configuration: { baseURL }, maxRetries: 0 });

  test(`LangChain, ${useResponsesApi ? "responses" : "chat"}: calls and structured output`, async () => {
    const weather = langchainTool(async () => "sun", { name: "get_weather", description: about, schema: place });
    const { tool_calls } = await model.bindTools([weather]).invoke(weatherAsked);
    assert.deepEqual(tool_calls.map(({ name, args }) => [name, args]), [["get_weather", { city: "Paris" }]]);
    assert.deepEqual(await model.withStructuredOutput(City).invoke(cityAsked), { name: "Paris", population: 200 });
  });
}
