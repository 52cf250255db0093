"""A run or a model that speaks: ready for `generate`, or turn by turn.

talk = Talk(load_speaker("runs/mine"))
for piece in talk.ask("What does os.path.join do?"): ...
"""

from collections.abc import Callable, Iterator
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora_lite.data.formats import Message
from qlora_lite.data.templates import ChatTemplate
from qlora_lite.evaluation.generation import stream
from qlora_lite.foundation.errors import DataError
from qlora_lite.foundation.watcher import Watcher
from qlora_lite.run import loading
from qlora_lite.run.loading import LoadedModel

Turns = tuple[Message, ...]


def load(target: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A run's model with its adapter attached, or any model, and its tokenizer.

    Both are transformers' own classes, ready for `generate`.

    Raises:
        QloraLiteError: if there is no such run or model, or it has no adapter yet.
    """
    loaded = load_for_chat(target)
    return loaded.base.model, loaded.tokenizer


def load_for_chat(
    target: str | Path, device: str = "auto", watcher: Watcher | None = None
) -> LoadedModel:
    """`loading.load`, without dropout, and with every end of turn that the model may say."""
    loaded = loading.load(target, device, watcher)
    loaded.base.model.eval()
    loaded.base.model.generation_config.eos_token_id = _stops(loaded)
    return loaded


class ChatSession:
    """A conversation with a model. The oldest turns are dropped when its context is full."""

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
        self.stops = _stops(loaded)
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.system: Turns = (Message("system", system),) if system else ()
        self.turns: Turns = ()
        self.num_dropped = 0
        """Turns that the last question pushed out."""
        config = self.model.config.get_text_config()
        self.context: int | None = getattr(config, "max_position_embeddings", None)

    def reset(self) -> None:
        """Forget everything that was said."""
        self.turns = ()

    def ask(self, text: str) -> Iterator[str]:
        """The answer, piece by piece. It is remembered as far as it was read.

        Raises:
            DataError: if the question alone does not fit into the model's context.
        """
        asked = (*self.turns, Message("user", text))
        room = None if self.context is None else self.context - 1
        kept = fit_turns(asked, lambda turns: len(self._ids(turns)), room)
        ids = self._ids(kept)
        length = self.max_new_tokens
        if self.context is not None:
            length = min(length, self.context - len(ids))
        self.num_dropped = len(asked) - len(kept)
        self.turns = kept
        said: list[str] = []
        try:
            for piece in stream(
                self.model, self.tokenizer, ids, self.stops, length, self.temperature
            ):
                said.append(piece)
                yield piece
        finally:
            self.turns = (*kept, Message("assistant", "".join(said).strip()))

    def _ids(self, turns: Turns) -> list[int]:
        text = self.template.prompt([*self.system, *turns])
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def fit_turns(turns: Turns, num_tokens: Callable[[Turns], int], room: int | None) -> Turns:
    """The newest turns that fit into `room` tokens; they begin with the user's.

    Raises:
        DataError: if the last turn alone does not fit.
    """
    kept = turns
    while room is not None and num_tokens(kept) > room:
        if len(kept) == 1:
            raise DataError(
                f"the question has {num_tokens(kept):,} tokens, and the model's context takes "
                f"{room:,} and an answer. Ask something shorter"
            )
        kept = kept[2:]
    return kept


def _stops(loaded: LoadedModel) -> list[int]:
    """Ends of a turn: by the template, by the tokenizer, and by the model's own settings."""
    own = loaded.base.model.generation_config.eos_token_id
    own = own if isinstance(own, list) else [own]
    ends = [ChatTemplate(loaded.tokenizer).end_of_turn_id, loaded.tokenizer.eos_token_id, *own]
    return [end for end in dict.fromkeys(ends) if end is not None]
