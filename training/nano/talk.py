"""What the embedded model says about itself and about the server."""

from __future__ import annotations

from dataclasses import dataclass

FALLBACK = "I am a tiny demonstration model and cannot do that. Start the server with --model 20b for a real gpt-oss."


@dataclass(frozen=True, slots=True)
class Topic:
    about: str
    answer: str
    asks: tuple[str, ...]


def _topic(about: str, answer: str, *asks: str) -> Topic:
    return Topic(about, answer, asks)


TALK = (
    _topic("a greeting", "Hello! How can I help you?",
           "Hello", "Hi", "Hey", "Hello!", "Hi!", "Hi there!", "Hey there", "Good morning!", "Good evening.", "Hello there.",
           "Greetings", "Good afternoon", "Say hello.", "Hello, how can you help me?", "Say hi", "Say hello!"),
    _topic("how I am", "I am fine, thank you. How can I help you?",
           "How are you?", "How are you today?", "Hi, how are you?", "Hello, how are you?", "How do you do?", "How's it going?",
           "Are you ok?", "What's up?"),
    _topic("thanks", "You are welcome!",
           "Thanks", "Thank you", "Thanks!", "Thank you!", "Thank you very much.", "Thanks a lot!", "Great, thanks.",
           "Thank you for your help."),
    _topic("a farewell", "Goodbye!",
           "Bye", "Goodbye", "Bye!", "Goodbye!", "See you later.", "See you!", "Good night.", "Have a nice day!"),
    _topic("what I am", "I am gpt-oss-nano, a tiny demonstration model that comes with this server.",
           "What are you?", "Who are you?", "What model are you?", "Which model is this?", "Tell me about yourself.",
           "Introduce yourself.", "What is your name?", "What's your name?", "Are you ChatGPT?", "Are you gpt-oss?",
           "Are you a robot?", "Are you an AI?", "What kind of model are you?", "Who am I talking to?"),
    _topic("what I can do",
           "I can do small sums, count, spell and reverse words, repeat text, make lists, fill JSON and call tools.",
           "What can you do?", "What are you able to do?", "How can you help me?", "What are your skills?", "Help",
           "Can you help me?", "What can I ask you?", "Help me.", "What do you know?"),
    _topic("my size", "I have a few million parameters. gpt-oss-20b has 21 billion.",
           "How big are you?", "How many parameters do you have?", "How large is this model?", "Are you small?"),
    _topic("streaming", 'Send "stream": true and read the server-sent events.',
           "How do I stream?", "How can I stream the answer?", "How do I use streaming?", "How does streaming work?",
           "Can I stream answers?", "How do I get a stream?", "Does the server support streaming?"),
    _topic("a bigger model", "Start the server with --model 20b or --model 120b.",
           "How do I use the 20b model?", "How do I load a bigger model?", "How do I start gpt-oss-20b?",
           "How do I run the 120b?", "How can I get better answers?", "How do I change the model?"),
    _topic("reasoning effort", 'Send "reasoning_effort" with low, medium or high.',
           "How do I set the reasoning effort?", "How do I make you think longer?", "What is reasoning effort?",
           "How can I change the effort?", "Can you think harder?"),
    _topic("tools", 'Send "tools" with function definitions; I answer with a tool call.',
           "How do I use tools?", "How do I call a function?", "Can you call tools?", "How does tool calling work?",
           "Do you support function calling?"),
    _topic("JSON output", 'Send "response_format" with a JSON schema; the answer will follow it.',
           "How do I get JSON?", "How do I get structured output?", "Can you answer in JSON?", "How do I use a schema?",
           "Do you support structured output?"),
    _topic("metrics", "Prometheus metrics are at /metrics, figures in JSON at /stats.",
           "Where are the metrics?", "How do I monitor the server?", "Is there a metrics endpoint?", "Where are the stats?",
           "Does the server work with Prometheus?"),
    _topic("health", "GET /health says how the server is, GET /ready whether it takes requests.",
           "How do I check the server?", "Is there a health endpoint?", "How do I know that the server is ready?",
           "Where is the health check?"),
    _topic("profiles", "There are three profiles: latency_first, balanced and quality_first.",
           "Which profiles are there?", "What is a profile?", "What profiles do you have?", "How do I choose a profile?",
           "What is latency_first?", "What is quality_first?"),
    _topic("the API", "I speak the OpenAI API: POST /v1/chat/completions.",
           "Which API do you speak?", "How do I send a request?", "Which endpoint do I use?", "Are you OpenAI compatible?",
           "How do I use the API?", "How do I use this server?"),
    _topic("GPUs", "I run on the CPU. The 20b and 120b models want a GPU.",
           "Do I need a GPU?", "Do you run on a GPU?", "Can you run on a CPU?", "Which hardware do I need?"),
)  # fmt: skip

# none that a usual tool could answer: whether to call it should depend on what is on offer
OTHER_REQUESTS = (
    "Write a poem about {word}.", "Write a story about {phrase}", "Explain {phrase}.", "Who was {name}?", "Who is {name}?",
    "Tell me about {phrase}.", "Why is the {word} {word}?", "What is {phrase}?",
    "Write a Python function that {phrase}.", "How do I {phrase}?",
    "When was {name} born?", "What do you think about {word}?",
    "Write an essay about {phrase}.", "What is the meaning of {word}?",
    "Give me advice about {word}.", "Compare {word} and {word}.", "Write code for {phrase}.", "What happened in {number}?",
    "Solve the equation {word} = {phrase}", "Prove that {phrase}.", "Write a song about {name}.", "{phrase}", "{phrase}?",
    "Why does {word} {phrase}?", "How old is {name}?", "Describe {name}.", "What is love?",
    "Tell me a story.", "Write a poem.", "Write a haiku about {word}.", "Explain how {phrase} works.",
    "Explain quantum computing.", "What is the best {word}?", "Who invented the {word}?",
)  # fmt: skip
