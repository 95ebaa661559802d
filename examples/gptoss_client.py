"""What gptoss.client adds to openai's client: the server's own fields, its reports, and functions as tools."""

from __future__ import annotations

import os

from gptoss.client import GptOss


def get_weather(city: str) -> dict[str, object]:
    """Get the current weather of a city.

    Args:
        city: name of the city
    """
    return {"city": city, "temperature_c": 7, "sky": "rain"}


def main() -> None:
    model = os.environ.get("GPTOSS_MODEL")
    with GptOss() as client:  # GPTOSS_URL, GPTOSS_API_KEY
        print("health:", client.health().status)
        reply = client.ask(
            "What is 12 + 30?", model=model, profile="latency_first", reasoning_budget=100, max_tokens=300
        )
        print("answer:", reply.text, f"({reply.served_model.model_id}, profile {reply.served_model.profile})")
        run = client.run_tools("What is the weather in Oslo?", [get_weather], model=model, max_tokens=300)
        print("calls:", [(call.name, call.arguments, call.result) for call in run.calls])
        print("told:", run.text)
        print("tokens so far:", client.stats().tokens.output)


if __name__ == "__main__":
    main()
