"""How much memory a run will take, counted before it is taken."""

from chargpt.config import TrainConfig, TransformerConfig
from chargpt.errors import TrainingError
from chargpt.evaluation import TOKENS_PER_PASS
from chargpt.models import parameter_estimate

BYTES = 4  # of a float32
WHAT_TO_LOWER = (
    "lower batch_size, model.block_size, model.n_layer or model.n_embd, set recompute=true, or close other programs"
)


def required_memory(config: TrainConfig, vocab_size: int) -> int:
    """Bytes that training takes at most, beside Python and the text: weights, optimizer and one batch, counted."""
    model = config.model
    held = 2 + (config.ema_decay is not None) + (1 if config.optimizer.kind == "muon" else 2)
    numbers = parameter_estimate(model, vocab_size) * (1 + held)  # the update itself is the one more
    per_token = 3 * vocab_size  # logits, their gradient, and one copy of another precision
    if isinstance(model, TransformerConfig):
        hidden = 0 if model.mlp == "none" else model.mlp_width * (3 if model.mlp == "swiglu" else 2)
        of_a_block = round(model.n_embd * (10 + hidden + 3 * (model.dropout > 0)))
        kept = 2 * model.n_embd if config.recompute else of_a_block  # the stream and the branch, or all
        per_token += (model.n_layer - 1) * kept + of_a_block
    training = config.batch_size * model.block_size * per_token
    return BYTES * (numbers + max(training, TOKENS_PER_PASS * 2 * vocab_size))


def require_memory(config: TrainConfig, vocab_size: int, available: int | None) -> None:
    """Raise TrainingError, with what to lower, when training needs more bytes than are free (None: not known)."""
    required = required_memory(config, vocab_size)
    if available is not None and required > available:
        raise TrainingError(
            f"training would take about {required / 2**20:,.0f} MiB of memory, and {available / 2**20:,.0f} MiB are "
            f"free; {WHAT_TO_LOWER}"
        )
