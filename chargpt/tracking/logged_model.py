"""The model as MLflow serves it: prompts in, generated texts out.

A "model from code": MLflow stores a copy of this file beside the checkpoint folder and runs it to load the model, so
nothing is pickled. It needs `chargpt` installed.
"""

from typing import Any

import mlflow.models
import pandas as pd  # type: ignore[import-untyped]
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from chargpt.checkpoint import load_model
from chargpt.config import SampleConfig
from chargpt.generation import generate_text


class TextGenerator(PythonModel):
    """`predict(prompts, params)` gives one text for each prompt, each drawn from the same seed."""

    def load_context(self, context: PythonModelContext) -> None:
        self.model, self.tokenizer = load_model(context.artifacts["checkpoint"])

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> list[str]:
        knobs = dict(params or {})
        knobs["top_k"] = knobs.get("top_k") or None  # 0: off, as MLflow's parameters have no null
        config = SampleConfig(**knobs)
        return [generate_text(self.model, self.tokenizer, prompt, config)[0] for prompt in model_input.iloc[:, 0]]


mlflow.models.set_model(TextGenerator())
