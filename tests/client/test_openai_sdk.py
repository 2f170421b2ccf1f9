"""The same contract through OpenAI's SDK with `extra_body`."""

from __future__ import annotations

from typing import Any

import openai

from editserver_client import EditFeatures, Inspect, SetFeature, extra_body

CHAT = "/v1/chat/completions"
HEAD = {"id": "chatcmpl-1", "created": 5, "model": "m"}
RECEIPT = {"digest": "d", "receipt": [{"id": "0", "type": "edit_features", "fired": 2}]}
MESSAGES: Any = [{"role": "user", "content": "Hi"}]
OURS = extra_body(interventions=[EditFeatures("a/b", [SetFeature(12, 0)])], inspect=Inspect("a/b", top_k=2))


def test_extra_body_reaches_the_top_level_and_the_receipt_can_be_read(server: Any, reply: Any) -> None:
    choice = {"index": 0, "message": {"role": "assistant", "content": "Bonjour."}, "finish_reason": "stop"}
    body = {**HEAD, "object": "chat.completion", "choices": [choice], "interventions": RECEIPT}
    server.on("POST", CHAT, reply(json=body, headers={"content-type": "application/json"}))
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        answer: Any = client.chat.completions.create(model="m", messages=MESSAGES, extra_body=OURS)
    sent = server.seen[0].json
    assert sent["interventions"] == [
        {"type": "edit_features", "sae": "a/b", "features": [{"index": 12, "op": "set", "value": 0}]}
    ]
    assert sent["inspect"] == {"sae": "a/b", "top_k": 2}
    assert answer.choices[0].message.content == "Bonjour."
    assert answer.interventions["receipt"][0]["fired"] == 2


def test_our_chunks_do_not_disturb_the_sdks_stream(server: Any, sse_reply: Any) -> None:
    head = {**HEAD, "object": "chat.completion.chunk"}
    deltas = [{**head, "choices": [{"index": 0, "delta": {"content": text}}]} for text in ("Bon", "jour")]
    server.on("POST", CHAT, sse_reply(*deltas, {**head, "choices": [], "choice": 0, "interventions": RECEIPT}))
    text, receipts = "", []
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        stream: Any = client.chat.completions.create(model="m", messages=MESSAGES, stream=True, extra_body=OURS)
        for chunk in stream:
            text += "".join(choice.delta.content or "" for choice in chunk.choices)
            receipts += [chunk.interventions] if not chunk.choices else []
    assert (text, receipts) == ("Bonjour", [RECEIPT])
