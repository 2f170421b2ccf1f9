"""OpenAI's SDK and ours against the real server."""

from __future__ import annotations

import openai
import pytest

from editserver_client import (
    AsyncClient,
    BadRequest,
    Client,
    EditFeatures,
    Inspect,
    Steer,
    TextDelta,
    Vector,
)
from editserver_client.features import SetFeature

from .conftest import D_MODEL, MODEL, RELU, Server

pytestmark = pytest.mark.engine

MESSAGES = [{"role": "user", "content": "Tell me about Paris."}]
GREEDY = {"temperature": 0, "max_tokens": 10}
STEER = {"type": "steer", "sae": RELU, "feature": 3, "strength": 90}


def test_openais_sdk_edits_with_extra_body_whole_and_streamed(server: Server) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    extra = {"interventions": [STEER], "inspect": {"sae": RELU, "top_k": 1}}
    whole = client.chat.completions.create(model=MODEL, messages=MESSAGES, extra_body=extra, **GREEDY)
    assert whole.interventions["receipt"][0]["fired"] > 0
    assert whole.inspection["tokens"]
    stream = client.chat.completions.create(model=MODEL, messages=MESSAGES, extra_body=extra, stream=True, **GREEDY)
    text, receipts = "", []
    for chunk in stream:
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
        if getattr(chunk, "interventions", None):
            receipts.append(chunk.interventions)
    assert text == whole.choices[0].message.content
    assert receipts == [whole.interventions]


def test_openais_sdk_sees_code_and_param_of_a_refusal(server: Server) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    bad = {"interventions": [STEER | {"feature": -1}]}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, extra_body=bad, **GREEDY)
    assert (caught.value.code, caught.value.param) == ("unknown_feature", "interventions[0].feature")


def test_our_client_streams_what_it_would_have_returned(server: Server) -> None:
    edits = [EditFeatures(RELU, [SetFeature(7, 60.0)]), Steer(sae=RELU, feature=3, strength=60.0)]
    asked = {"interventions": edits, "inspect": Inspect(RELU, top_k=3, features=[7]), **GREEDY}
    with Client(server.url) as client:
        whole = client.chat("Tell me about Paris.", **asked)
        with client.chat_stream("Tell me about Paris.", **asked) as stream:
            text = "".join(event.text for event in stream if isinstance(event, TextDelta))
            assert text == stream.text == whole.text
            assert stream.receipt == whole.receipt
            streamed = stream.final()
        assert [t.position for t in streamed.readings.tokens] == [t.position for t in whole.readings.tokens]
        three = client.chat("Hi", n=3, temperature=1.0, max_tokens=4, interventions=edits)
        assert all(len(choice.interventions.receipt) == 2 for choice in three.choices)


def test_our_client_reads_the_catalogue_and_keeps_vectors(server: Server) -> None:
    with Client(server.url) as client:
        capabilities = client.capabilities()
        assert capabilities.d_model == D_MODEL
        assert client.sae(RELU) in client.saes()
        assert client.feature(RELU, 3).label == "a probe direction"
        assert client.features(RELU, "probe")[0].score == 1.0
        assert client.activations(RELU, "The cat sat", top_k=2)[0].tokens[0].token == " cat"
        stored = client.library.vectors.put("sdk", Vector({15: [1.0] * D_MODEL}, description="from the SDK"))
        assert stored in client.library.vectors.list()
        assert client.library.vectors.get("sdk").body["description"] == "from the SDK"
        assert client.chat("Hi", interventions=[Steer(vector="sdk", strength=0.5)], **GREEDY).receipt.receipt[0].fired
        client.library.vectors.delete("sdk")
        with pytest.raises(BadRequest) as caught:
            client.chat("Hi", interventions=[Steer(vector="sdk")], **GREEDY)
        assert caught.value.code == "unknown_vector"


async def test_our_async_client_completes(server: Server) -> None:
    async with AsyncClient(server.url) as client:
        answer = await client.complete(
            "The sky is", interventions=[Steer(sae=RELU, feature=3, strength=90.0)], **GREEDY
        )
        assert answer.receipt.receipt[0].fired > 0
