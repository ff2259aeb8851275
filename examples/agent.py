"""An agent with two tools: python examples/agent.py "What is 12 plus 7?"

A small model chooses badly and fills in well: so the nearest description chooses the tool, and the
model is made to call it, with arguments that follow its schema.
"""

from __future__ import annotations

import json
import operator
import sys
from typing import Any

from forebay import LiteLLMGateway

FACTS = {"library": "open from 9 to 18 o'clock", "ferry": "leaves every hour", "museum": "closed"}
SIGNS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


def look_up(place: str) -> str:
    return f"The {place} is: {FACTS[place]}."


def calculate(a: float, sign: str, b: float) -> str:
    return f"{a} {sign} {b} = {SIGNS[sign](a, b)}"


def tool(name: str, words: str, **properties: dict[str, Any]) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    about = {"name": name, "description": words, "parameters": schema}
    return {"type": "function", "function": about}


NUMBER = {"type": "integer"}
TOOLS = [
    tool("look_up", "when is a place open: library, ferry, museum", place={"enum": list(FACTS)}),
    tool("calculate", "calculate numbers: 3 plus 4, 5 times 6", a=NUMBER,
         sign={"enum": list(SIGNS)}, b=NUMBER),
]  # fmt: skip


def main(question: str) -> None:
    with LiteLLMGateway() as gateway:
        words = [one["function"]["description"] for one in TOOLS]
        *about, asked = gateway.embed([*words, question]).array
        chosen = max(zip(TOOLS, about, strict=True), key=lambda pair: float(pair[1] @ asked))[0]
        answer = gateway.generate(question, tools=[chosen], tool_choice="required", temperature=0)
        call = answer.raw_response["choices"][0]["message"]["tool_calls"][0]["function"]
        try:
            result = globals()[chosen["function"]["name"]](**json.loads(call["arguments"]))
        except (ValueError, TypeError, KeyError, ArithmeticError) as error:
            result = f"That did not work: {error}"
        print(f"{call['name']}{call['arguments']} -> {result}")
        prompt = f"{question}\nUse this: {result}\nAnswer in one sentence."
        print(gateway.generate(prompt, max_tokens=40, temperature=0).text)


if __name__ == "__main__":
    main(*sys.argv[1:])
