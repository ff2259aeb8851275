"""The embedded default's models over HTTP: real text and real vectors."""

from __future__ import annotations

import numpy as np
import openai
import pytest


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def test_local_chat_answers_and_streams_token_by_token(client: openai.OpenAI) -> None:
    question = [{"role": "user", "content": "Say hello in one short sentence."}]
    answer = client.chat.completions.create(
        model="local-chat",
        messages=question,
        max_tokens=24,
        temperature=0,
        seed=1,  # type: ignore[arg-type]
    )
    chunks = list(
        client.chat.completions.create(
            model="local-chat",
            messages=question,
            max_tokens=24,
            temperature=0,
            seed=1,
            stream=True,  # type: ignore[arg-type]
        )
    )
    pieces = [
        c.choices[0].delta.content for c in chunks if c.choices and c.choices[0].delta.content
    ]

    assert answer.choices[0].message.content
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 24
    assert "".join(pieces) == answer.choices[0].message.content
    assert len(pieces) >= answer.usage.completion_tokens * 0.5


@pytest.mark.parametrize("dimensions", [64, 128, 256])
def test_local_embed_knows_what_is_alike(client: openai.OpenAI, dimensions: int) -> None:
    answer = client.embeddings.create(
        model="local-embed",
        input=["the cat sat on the mat", "a kitten lay on the rug", "quarterly tax returns"],
        dimensions=dimensions,
    )
    cat, kitten, tax = (np.array(item.embedding) for item in answer.data)

    assert len(cat) == dimensions
    assert cat @ kitten > cat @ tax + 0.1
    assert answer.usage.prompt_tokens >= 15


def test_other_dimensions_are_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="dimensions"):
        client.embeddings.create(model="local-embed", input="x", dimensions=100)
