"""Parameters of the suite: `backend`; `case` (every combination), `default_case` (every mixer and feed-forward once) and `other_case` (the
rest, which takes one form of a check where `default_case` takes several: what a check costs is mostly JAX's compilations).

The whole suite (`make test-full`, SMEDJAN_TEST_FULL=1) takes most of an hour on two cores. `make test` leaves out the
combinations that `_in_short_form` does not name, and for other mixers than attention the checks of what is not theirs.
"""

import importlib.util
import os
import pathlib

import pytest

from tests.conformance.cases import CASES, DEFAULT_CASES, OTHER_CASES
from tests.conformance.subjects import BACKENDS

FULL = os.environ.get("SMEDJAN_TEST_FULL") == "1"
ONCE = {  # what no mixer changes, or what costs most, is checked with attention, and with attention and experts
    "test_loss_in_chunks_is_the_loss_in_one",
    "test_documents_go_with_their_rows_through_accumulation_and_checkpointing",
    "test_a_run_repeated_in_a_fresh_backend_has_the_same_bits",
    "test_every_attention_that_runs_here_gives_the_gradients_of_the_plain_one",
    "test_deterministic_training_computes_the_same",
    "test_decoder_of_the_protocol_gives_the_logits_of_the_real_vocabulary",
    "test_feeding_nothing_is_refused",
    "test_a_full_device_is_told_with_the_flags_of_what_it_does",
    "test_decoder_takes_the_parameters_of_a_state_as_they_are",
    "test_optimizer_equals_its_definition_for_20_steps",
    "test_optimizer_settings_mean_the_same_in_both_backends_and_in_the_definition",
    "test_compiled_mlx_trains_as_the_uncompiled",
    "test_a_training_step_moves_the_parameters_by_clipped_adamw",
    "test_loss_counts_exactly_the_targets_that_are_not_ignored",
    "test_loss_of_a_batch_without_counted_targets_is_zero_and_finite",
    "test_training_lowers_the_loss_of_a_batch_that_repeats",
    "test_both_backends_decode_the_same_greedy_tokens",
    "test_gradients_are_those_of_each_document_by_itself",
    "test_a_run_resumed_from_a_checkpoint_is_the_uninterrupted_run",
    "test_a_run_handed_to_the_other_backend_is_the_same_run",
    "test_a_run_handed_over_and_back_is_the_same_run",
    "test_restoring_a_snapshot_continues_bit_for_bit",
    "test_grad_norm_is_the_norm_before_clipping",
    "test_pieces_and_parameters_on_the_device_change_nothing",
    "test_several_targets_of_a_position_are_scored_at_once",
    "test_equal_logits_go_to_the_smaller_id_and_padding_rows_are_no_tokens",
    "test_logits_equal_the_reference_over_the_models_own_tokens",
    "test_scores_of_both_backends_are_equal",
    "test_a_full_device_is_told_with_what_scoring_can_lower",
}
WITHOUT_EXPERTS = {"test_compiled_mlx_trains_as_the_uncompiled"}  # of those the ones where g++ compiles for ten seconds and more
ONE_OF_SEVERAL = {"cut": "in chunks", "kept": "full", "position": 8, "length": 48}  # parameters of checks that other mixers take once
VARIANTS = ("attention-swiglu-gqa", "attention-swiglu-gqa-yarn", "attention-swiglu-mha-window")
OF_THE_PATTERN = {  # what all mixers together are checked for: their layers are checked one by one
    "test_logits_equal_the_reference",
    "test_logits_of_both_backends_are_equal",
    "test_every_gradient_of_both_backends_is_equal",
    "test_twenty_steps_are_the_same_in_both_backends",
    "test_loss_rows_are_those_that_are_stored",
    "test_a_checkpoint_gives_back_every_bit",
}
HERE = pathlib.Path(__file__).parent
INSTALLED = {"jax": "jax", "mlx": "mlx.core"}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for name, cases in (("case", CASES), ("default_case", DEFAULT_CASES), ("other_case", OTHER_CASES)):
        if name in metafunc.fixturenames:
            # tests of one case share its compiled functions, so they go to one worker
            metafunc.parametrize(name, [pytest.param(case, id=key, marks=pytest.mark.xdist_group(key)) for key, case in cases.items()])
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", BACKENDS)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what only the whole suite runs."""
    left_out = {item for item in items if not FULL and item.path.parent == HERE and not _in_short_form(item)}
    if left_out:
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [item for item in items if item not in left_out]


def _in_short_form(item: pytest.Item) -> bool:
    params = item.callspec.params if hasattr(item, "callspec") else {}
    if ": " in str(params.get("mutation", "")):  # of a row of its own: the side that is mutated is the definition
        return params["backend"] == "mlx"
    found = [params[name] for name in ("case", "default_case", "other_case", "apart", "key") if name in params]
    if not found:
        return True
    key, name = getattr(found[0], "id", found[0]), getattr(item, "originalname", item.name)
    if key not in CASES:
        return True
    if key.startswith("all-"):
        return key in DEFAULT_CASES and name in OF_THE_PATTERN
    if key in ("attention-swiglu-mha", "attention-experts-mha"):
        return key == "attention-swiglu-mha" or name not in WITHOUT_EXPERTS
    if name in ONCE or any(params.get(each, value) != value for each, value in ONE_OF_SEVERAL.items()):
        return False
    return key in DEFAULT_CASES or key in VARIANTS


@pytest.fixture(autouse=True)
def _installed(request: pytest.FixtureRequest) -> None:
    """A test of a backend that is not on this machine is skipped, and says so."""
    needed = (
        BACKENDS
        if "both_backends" in request.fixturenames
        else (request.node.callspec.params.get("backend"),)
        if _has_params(request)
        else ()
    )
    for name in needed:
        if name and not _found(INSTALLED[name]):
            pytest.skip(f"{name} is not installed here")


@pytest.fixture
def both_backends() -> tuple[str, ...]:
    """Asks for both backends; the test is skipped where one is not installed."""
    return BACKENDS


def installed() -> list[str]:
    """The backends of this machine."""
    return [name for name in BACKENDS if _found(INSTALLED[name])]


def _has_params(request: pytest.FixtureRequest) -> bool:
    return hasattr(request.node, "callspec")


def _found(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # the parent of a dotted name
        return False
