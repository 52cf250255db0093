"""Loss and answers of one model on the questions of a data set."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from qlora_lite.data.batches import evaluation_batches
from qlora_lite.data.encoding import encode
from qlora_lite.data.examples import ExamplesBuilder
from qlora_lite.data.templates import ChatTemplate
from qlora_lite.evaluation.generation import answers
from qlora_lite.evaluation.perplexity import score
from qlora_lite.model.causal import CausalModel
from real_results.material import Material
from real_results.metrics import measure
from real_results.questions import Question

BATCH_ROWS = 64
BATCH_TOKENS = 2048
NUM_SAMPLES = 3


def score_model(
    model: CausalModel,
    tokenizer: PreTrainedTokenizerBase,
    material: Material,
    questions: Sequence[Question],
) -> dict[str, Any]:
    """Loss on the first reference of each question, the metric of the answers, and samples.

    Rows are padded, not packed: every model is scored in the same way.
    """
    template = ChatTemplate(tokenizer)
    rows = encode(template, [template.render(question.row) for question in questions])
    examples = ExamplesBuilder()
    for i, row in enumerate(rows):
        examples.add(row.ids, row.loss_mask, i)
    batches = evaluation_batches(
        examples.build(),
        max_tokens=max(len(row.ids) for row in rows),
        micro_batch_tokens=BATCH_TOKENS,
        packing=False,
    )
    found: dict[str, Any] = {"loss": score(model, batches).loss}
    asked = list(questions[: material.num_answered])
    texts = answers(
        model.module,
        tokenizer,
        [row.ids[: row.loss_mask.index(True)] for row in rows[: len(asked)]],
        list(dict.fromkeys([template.end_of_turn_id, tokenizer.eos_token_id])),
        material.answer_tokens,
        BATCH_ROWS,
    )
    if material.metric is not None:
        found |= measure(material.metric, texts, [question.references for question in asked])
    found["samples"] = [
        {"question": question.text, "answer": text, "reference": question.references[0]}
        for question, text in list(zip(asked, texts, strict=True))[:NUM_SAMPLES]
    ]
    return found
