"""What the page asks about one place of a text."""

import base64
import json

import numpy as np
import pytest
import torch

from chargpt.config import BigramConfig, SampleConfig, TransformerConfig
from chargpt.generation import stream_tokens
from chargpt.kernels.ops.packed_attention import split
from chargpt.models import Ensemble, Transformer
from chargpt.serve.look import held, look
from serving import CONFIG, TOKENIZER, Served, made

V = TOKENIZER.vocab_size
SHAPES = {
    "rotary": CONFIG,
    "learned": TransformerConfig(block_size=12, n_layer=3, n_head=4, n_embd=16),
    "grouped": TransformerConfig(
        block_size=9,
        n_layer=2,
        n_head=4,
        n_kv_head=2,
        n_embd=16,
        position="rotary",
        qk_norm=True,
        value_embeddings=True,
        bigram_embeddings=True,
    ),
}


@pytest.mark.parametrize("prompt", [1, 5, 9, 30])
@pytest.mark.parametrize("name", [*SHAPES, "bigram", "two"])
def test_a_token_was_predicted_from_what_is_looked_at(name: str, prompt: int) -> None:
    """Through several rollovers."""
    one = made(V, 1, SHAPES.get(name, BigramConfig()))
    model = Ensemble([one, made(V, 2)]).eval() if name == "two" else one
    idx = torch.randint(V, (1, prompt), generator=torch.Generator().manual_seed(prompt))
    tokens = idx[0].tolist()
    for written, drawn in enumerate(stream_tokens(model, idx, SampleConfig(max_new_tokens=40, seed=1))):
        place = look(model, tokens, written)
        assert place.window == tokens[-held(prompt, written, model.block_size) :]
        assert drawn.logits is not None
        torch.testing.assert_close(place.logprobs, drawn.logits[0, 0].log_softmax(-1), rtol=1e-4, atol=1e-5)
        tokens.append(int(drawn.tokens))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("length", [1, 2, 8])
def test_attention_is_the_softmax_of_the_last_query(name: str, length: int) -> None:
    """By watching what `causal_attention` gets, in float64."""
    model = made(V, 1, SHAPES[name])
    assert isinstance(model, Transformer)
    tokens = torch.randint(V, (length,), generator=torch.Generator().manual_seed(1)).tolist()
    place = look(model, tokens)
    assert place.attention is not None
    assert place.attention.shape == (model.config.n_layer, model.config.n_head, length)
    seen: list[torch.Tensor] = []

    def watch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: object) -> torch.Tensor:
        keys = k.double().repeat_interleave(q.size(1) // k.size(1), 1)
        weights = (q.double() @ keys.mT / q.size(-1) ** 0.5).masked_fill(mask, -torch.inf).softmax(-1)  # (1, H, T, T)
        seen.append(weights[0, :, -1])
        return (weights @ v.double().repeat_interleave(q.size(1) // v.size(1), 1)).float()

    def watch_packed(qkv: torch.Tensor, n_head: int, n_kv_head: int, **_: object) -> torch.Tensor:
        return watch(*split(qkv, n_head, n_kv_head)).transpose(1, 2).flatten(2)

    mask = torch.ones(length, length, dtype=torch.bool).triu(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("chargpt.models.transformer.causal_attention", watch)
        patch.setattr("chargpt.models.transformer.packed_causal_attention", watch_packed)
        with torch.no_grad():
            model.hidden(torch.tensor([tokens]))
    torch.testing.assert_close(place.attention.double(), torch.stack(seen), rtol=1e-4, atol=1e-5)


def test_other_models_have_no_attention_to_show() -> None:
    assert look(made(V, 1, BigramConfig()), [1, 2]).attention is None
    assert look(Ensemble([made(V, 1), made(V, 2)]).eval(), [1, 2]).attention is None
    with pytest.raises(ValueError, match="nothing to look at"):
        look(made(V, 1), [])


def test_what_the_server_says_of_a_place(served: Served) -> None:
    ids = TOKENIZER.encode("abc ad").tolist()
    model = served.engines["small"].model
    for prompt in ("abc ad", ids):
        found = served.post("/look", {"model": "small", "prompt": prompt, "top": 7, "attention": True}).json()
        place = look(model, ids)
        assert found["tokens"] == ids
        assert found["texts"] == list("abc ad")
        logprobs = [each["logprob"] for each in found["next"]]
        assert logprobs == pytest.approx(sorted(place.logprobs.tolist(), reverse=True)[:7], abs=1e-5)
        assert logprobs == pytest.approx([float(place.logprobs[each["token"]]) for each in found["next"]], abs=1e-5)
        assert [TOKENIZER.decode([each["token"]]) for each in found["next"]] == [each["text"] for each in found["next"]]
        assert place.attention is not None
        weights = np.frombuffer(base64.b64decode(found["attention"]["weights"]), np.uint8)
        shape = found["attention"]["layers"], found["attention"]["heads"], len(ids)
        assert np.abs(weights.reshape(shape) / 255 - place.attention.numpy()).max() <= 0.5 / 255 + 1e-6
    whole = served.post("/look", {"model": "small", "prompt": "a", "written": ids * 5, "top": 1000}).json()
    assert len(whole["next"]) == V
    assert "attention" not in whole
    assert whole["tokens"] == (ids * 5)[-held(1, 30, 16) :]
    assert "attention" not in served.post("/look", {"model": "bigram", "prompt": "a", "attention": True}).json()


@pytest.mark.parametrize(
    ("content", "status", "message"),
    [
        ({"model": "none"}, 404, "no model 'none'"),
        ({"model": "small", "prompt": "é"}, 400, "é"),
        ({"model": "small", "prompt": []}, 400, "prompt"),
        ({"model": "small", "prompt": [V]}, 400, f"from 0 to {V - 1}"),
        ({"model": "small", "prompt": "a", "written": [-1]}, 400, f"from 0 to {V - 1}"),
        ({"model": "small", "prompt": "a", "top": 0}, 400, "top"),
        ({"model": "small", "prompt": "a", "topp": 1}, 400, "topp"),
    ],
)
def test_what_cannot_be_looked_at_is_refused(served: Served, content: object, status: int, message: str) -> None:
    answer = served.post("/look", content)
    assert answer.status_code == status
    assert message in answer.json()["error"]["message"]


def test_a_stream_names_its_tokens(served: Served) -> None:
    """A character of several bytes comes with its last token."""
    content = {"model": "bytes", "prompt": "é", "max_tokens": 60, "return_token_ids": True, "n": 2, "seed": 1}
    biased = content | {"logit_bias": {str(byte): 50 for byte in "🙂".encode()}}
    whole = served.post("/v1/completions", biased).json()["choices"]
    lines = served.post("/v1/completions", biased | {"stream": True}).text.split("\n\n")
    parts = [json.loads(line[6:])["choices"][0] for line in lines if line.startswith("data: {")]
    for i in range(2):
        mine = [part for part in parts if part["index"] == i]
        assert whole[i]["prompt_token_ids"] == list("é".encode()) == mine[0]["prompt_token_ids"]
        assert whole[i]["prompt_token_texts"] == ["", "é"]
        assert all("prompt_token_ids" not in part for part in mine[1:])
        for field in ("token_ids", "token_texts"):
            assert [value for part in mine for value in part[field]] == whole[i][field]
        assert len(whole[i]["token_ids"]) == len(whole[i]["token_texts"]) == 60
        text = "".join(whole[i]["token_texts"])
        assert whole[i]["text"].startswith(text)
        assert len(whole[i]["text"]) - len(text) <= 1  # what was not complete
    plain = served.post("/v1/completions", content | {"return_token_ids": False}).json()["choices"][0]
    assert "token_ids" not in plain
