"""A server in a thread of this process, of models with random weights, for the tests of several files."""

import dataclasses
import threading
import time
from typing import Any

import httpx2
import openai
import torch
import uvicorn

from chargpt.config import TransformerConfig
from chargpt.models import LanguageModel, build_model
from chargpt.serve.app import build_app
from chargpt.serve.engine import ModelEngine
from chargpt.serve.listen import bind, configured
from chargpt.tokenizers import CharacterTokenizer

TOKENIZER = CharacterTokenizer("\n .:ABENRSTUabcdefgh")
CONFIG = TransformerConfig(
    block_size=16, n_layer=2, n_head=2, n_embd=16, position="rotary", norm="rmsnorm", mlp="relu2"
)


def made(vocab_size: int, seed: int, config: Any = CONFIG) -> LanguageModel:
    """With weights so large that the text is not all alike."""
    model = build_model(config, vocab_size, seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.4 * torch.randn(parameter.shape, generator=generator)
    return model


@dataclasses.dataclass
class Served:
    url: str
    engines: dict[str, ModelEngine]

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", **{"api_key": "none", "max_retries": 0} | options)

    def post(self, path: str, content: Any, **options: Any) -> httpx2.Response:
        return httpx2.post(f"{self.url}{path}", json=content, timeout=30, **options)

    def get(self, path: str) -> httpx2.Response:
        return httpx2.get(f"{self.url}{path}", timeout=30)

    def idle(self) -> bool:
        return not any(engine.running or engine.waiting for engine in self.engines.values())


class Running:
    """A server in a thread of this process."""

    def __init__(self, engines: dict[str, ModelEngine], **options: Any) -> None:
        listener = bind("127.0.0.1", 0)
        self.server = uvicorn.Server(configured(build_app(engines, **options)))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listener]})
        self.thread.start()
        while not self.server.started:
            time.sleep(0.005)
        self.served = Served(f"http://127.0.0.1:{listener.getsockname()[1]}", engines)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join()
        for engine in self.served.engines.values():
            engine.close()
