"""The real chat model learns to answer briefly, within its plan. About a minute."""

import pytest

from qlora_lite.demo import claims
from qlora_lite.demo.lessons import SHOWN, Lesson
from qlora_lite.run.folder import RunFolder
from qlora_lite.run.training import run_recipe
from qlora_lite.training import metrics

pytestmark = pytest.mark.real


def test_three_steps_lower_the_held_out_loss_within_the_plan(real_base, tmp_path):
    recipe = Lesson(str(real_base), is_real=True).recipe(tmp_path, steps=3)
    result = run_recipe(recipe.but("data.max_rows=64", "evaluation.samples=1"))
    run = RunFolder(result.directory)
    claims.check_learning(metrics.read(run.metrics))
    (sample,) = result.samples
    assert SHOWN[0] in sample.prompt
    assert "square root" in sample.before
