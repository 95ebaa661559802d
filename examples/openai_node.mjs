// A question, a stream and a tool call with openai's client for JavaScript.
import OpenAI from "openai";

const model = process.env.GPTOSS_MODEL ?? "gpt-oss-nano";
const client = new OpenAI({
  baseURL: (process.env.GPTOSS_URL ?? "http://127.0.0.1:8000") + "/v1",
  apiKey: process.env.GPTOSS_API_KEY ?? "none",
});
const messages = [{ role: "user", content: "What is 12 + 30?" }];

const answer = await client.chat.completions.create({ model, messages, max_tokens: 200 });
console.log("answer:", answer.choices[0].message.content);

process.stdout.write("stream: ");
for await (const chunk of await client.chat.completions.create({ model, messages, max_tokens: 200, stream: true })) {
  process.stdout.write(chunk.choices[0]?.delta.content ?? "");
}
console.log();

const wanted = await client.chat.completions.create({
  model,
  messages: [{ role: "user", content: "What is the weather in Oslo?" }],
  tools: [
    {
      type: "function",
      function: {
        name: "get_weather",
        parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
      },
    },
  ],
  tool_choice: "required",
  max_tokens: 300,
});
const call = wanted.choices[0].message.tool_calls[0];
console.log("call:", call.function.name, JSON.parse(call.function.arguments));
