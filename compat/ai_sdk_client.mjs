// A question through the AI SDK with the code interpreter:  node ai_sdk_client.mjs http://127.0.0.1:8000
// Prints one JSON object: the answer, the calls and their results, and the parts of a stream.
import { createOpenAI } from '@ai-sdk/openai';
import { generateText, streamText } from 'ai';

const openai = createOpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: 'none' });
const asked = {
  model: openai.responses('gpt-oss-nano'),
  prompt: 'What is 41 + 1?',
  tools: { code_interpreter: openai.tools.codeInterpreter({}) },
  maxRetries: 0,
};
const whole = await generateText(asked);
const parts = [];
for await (const part of streamText(asked).fullStream) {
  if (part.type === 'error') throw part.error;
  if (parts.at(-1) !== part.type) parts.push(part.type);
}
console.log(JSON.stringify({
  answer: whole.text,
  calls: whole.toolCalls.map((call) => call.input),
  results: whole.toolResults.map((result) => result.output),
  parts,
}));
