"""What the training loop works with: batches, scorer, and rows for error messages."""

import pytest

from qlora_lite.data.load import load_data
from qlora_lite.foundation import device
from qlora_lite.foundation.errors import BaseModelError
from qlora_lite.model.tokenizer import load_tokenizer
from qlora_lite.run.job import held_out_batches, require_known_tokens, training_batches
from qlora_lite.run.setup import set_up
from qlora_lite.run.training import run_recipe
from tests.end_to_end.small_run import recipe_in, small_recipe
from tests.tiny import save_tiny


def test_held_out_rows_are_each_scored_once_and_never_trained_on(folder):
    recipe = recipe_in(folder, "run", "data.heldout_share=0.2")
    data = load_data(recipe.data, load_tokenizer(recipe.base), recipe.seed)
    batches = held_out_batches(recipe, data.heldout, packs=True)
    heldout = [row for batch in batches for row in batch.rows]
    assert sorted(heldout) == sorted(example.row for example in data.heldout)
    batches = training_batches(recipe, data, 128, packs=True)
    trained = {row for n in range(batches.steps) for b in batches.step(n) for row in b.rows}
    assert trained
    assert not trained & set(heldout)


def test_a_tokenizer_of_another_model_is_an_error_before_the_base_is_loaded(folder, tmp_path):
    save_tiny(tmp_path / "base", vocab_size=90)
    recipe = small_recipe(tmp_path / "base", folder / "train.jsonl", tmp_path / "run")
    with pytest.raises(BaseModelError, match="has tokens 0 to 89: its tokenizer belongs to"):
        run_recipe(recipe)
    assert not (tmp_path / "run" / "recipe.json").exists()


@pytest.mark.parametrize("packs", [True, False], ids=["packs", "does-not-pack"])
def test_rows_share_a_bin_only_in_a_model_that_keeps_them_apart(folder, packs):
    recipe = recipe_in(folder, "run", "data.heldout_share=0.2")
    data = load_data(recipe.data, load_tokenizer(recipe.base), recipe.seed)
    training = training_batches(recipe, data, 128, packs)
    for batches in (training.step(0), list(held_out_batches(recipe, data.heldout, packs))):
        num_rows = sum(len(batch.rows) for batch in batches)
        num_bins = sum(len(batch.input_ids) for batch in batches)
        assert num_rows > num_bins if packs else num_rows == num_bins


def test_the_largest_known_token_is_one_below_the_size_of_the_vocabulary(folder, tmp_path):
    recipe = recipe_in(folder, "run")
    data = load_data(recipe.data, load_tokenizer(recipe.base), recipe.seed)
    largest = int(max(data.train.ids.max(), data.heldout.ids.max()))

    def check(vocabulary):
        base = save_tiny(tmp_path / str(vocabulary), vocab_size=vocabulary)
        require_known_tokens(data, set_up(recipe.but(f"base.model={base}"), device.choose("cpu")))

    check(largest + 1)
    with pytest.raises(BaseModelError, match=f"contain token {largest} .*0 to {largest - 1}: "):
        check(largest)
