"""Load a run or a model for `generate`, or chat with it.

session = ChatSession(load_for_chat("runs/mine"))
for piece in session.ask("What does os.path.join do?"): ...
"""

from collections.abc import Callable, Iterator
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora_lite.data.messages import Message
from qlora_lite.data.row_errors import RowError
from qlora_lite.data.templates import ChatTemplate
from qlora_lite.evaluation.generation import stream
from qlora_lite.foundation.errors import DataError
from qlora_lite.foundation.watcher import Watcher
from qlora_lite.run import loading
from qlora_lite.run.loading import LoadedModel

Messages = tuple[Message, ...]


def load(
    target: str | Path, *, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A run's model with its adapter attached, or any model, and its tokenizer.

    Both are transformers' own classes, ready for `generate`.

    Args:
        trust_remote_code: let the base run its own Python code. Read it first.

    Raises:
        QloraLiteError: if there is no such run or model, or it has no adapter yet.
    """
    loaded = load_for_chat(target, trust_remote_code=trust_remote_code)
    return loaded.base.model, loaded.tokenizer


def load_for_chat(
    target: str | Path,
    device: str = "auto",
    watcher: Watcher | None = None,
    *,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """`loading.load`, in evaluation mode and with every end-of-turn token as an eos token."""
    loaded = loading.load(target, device, watcher, trust_remote_code=trust_remote_code)
    loaded.base.model.eval()
    loaded.base.model.generation_config.eos_token_id = _stop_ids(loaded)
    return loaded


class ChatSession:
    """A conversation with a model. The oldest messages are dropped when its context is full."""

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        system: str | None = None,
    ) -> None:
        self.model = loaded.base.model
        self.tokenizer = loaded.tokenizer
        self.template = ChatTemplate(loaded.tokenizer)
        self.stop_ids = _stop_ids(loaded)
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        if system:
            self._require_plain(system, "the system message")
        self.system: Messages = (Message("system", system),) if system else ()
        self.messages: Messages = ()
        self.num_dropped = 0
        """Messages that were dropped to make room for the last question."""
        config = self.model.config.get_text_config()
        self.context: int | None = getattr(config, "max_position_embeddings", None)

    def reset(self) -> None:
        """Start a new conversation."""
        self.messages = ()

    def ask(self, text: str) -> Iterator[str]:
        """Stream the answer. What the caller has consumed of it becomes part of the conversation.

        Raises:
            DataError: if the question contains a control token, or alone does not fit into the
                model's context.
        """
        self._require_plain(text, "the question")
        all_messages = (*self.messages, Message("user", text))
        max_tokens = None if self.context is None else self.context - 1
        messages = drop_oldest(all_messages, lambda some: len(self._ids(some)), max_tokens)
        ids = self._ids(messages)
        length = self.max_new_tokens
        if self.context is not None:
            length = min(length, self.context - len(ids))
        self.num_dropped = len(all_messages) - len(messages)
        self.messages = messages
        answer: list[str] = []
        try:
            for piece in stream(
                self.model, self.tokenizer, ids, self.stop_ids, length, self.temperature
            ):
                answer.append(piece)
                yield piece
        finally:
            self.messages = (*messages, Message("assistant", "".join(answer).strip()))

    def _require_plain(self, text: str, what: str) -> None:
        try:
            self.template.control_tokens.require_none(text, what)
        except RowError as error:
            raise DataError(str(error)) from None

    def _ids(self, messages: Messages) -> list[int]:
        text = self.template.prompt([*self.system, *messages])
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def drop_oldest(
    messages: Messages, num_tokens: Callable[[Messages], int], max_tokens: int | None
) -> Messages:
    """The newest messages that fit into `max_tokens`; questions are dropped with their answers.

    Raises:
        DataError: if the last question alone does not fit.
    """
    while max_tokens is not None and num_tokens(messages) > max_tokens:
        if len(messages) == 1:
            raise DataError(
                f"the question has {num_tokens(messages):,} tokens, and the model's context has "
                f"room for {max_tokens:,} and an answer. Ask something shorter"
            )
        messages = messages[2:]
    return messages


def _stop_ids(loaded: LoadedModel) -> list[int]:
    """Tokens that end an answer: of the template, the tokenizer, and the generation config."""
    configured = loaded.base.model.generation_config.eos_token_id
    configured = configured if isinstance(configured, list) else [configured]
    template = ChatTemplate(loaded.tokenizer)
    ids = [template.end_of_turn_id, loaded.tokenizer.eos_token_id, *configured]
    return [token for token in dict.fromkeys(ids) if token is not None]
